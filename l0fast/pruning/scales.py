"""The gates of branches and experts as they become a part of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from l0fast.graph.fewer import mixture_of
from l0fast.layers.branch import CHILD, branch_gates
from l0fast.layers.experts import expert_gates, last_weights, scaled
from l0fast.layers.gated import Gated
from l0fast.layers.rms_norm import form_of


@dataclass(frozen=True)
class Scale:
    """A gate that multiplies what a module gives."""

    gate: str
    """The name of the gates."""
    place: int | None
    """Of the one among them; None: the module has weights of several experts, one gate for each."""


def scales_of(model: nn.Module, layers: Mapping[str, Gated]) -> dict[str, list[Scale]]:
    """Name of a module -> the gates of branches and experts that multiply what it gives.

    Args:
        model: with gates.
        layers: those with gates.
    """
    found: dict[str, list[Scale]] = {}
    for name in branch_gates(layers):
        found.setdefault(name.removesuffix(f".{CHILD}"), []).append(Scale(name, 0))
    names = {id(module): name for name, module in model.named_modules()}
    for name, gate in expert_gates(layers).items():
        mixture = mixture_of(name, gate)
        for host, place in mixture.hosts(model.get_submodule(mixture.name)):
            found.setdefault(names[id(host)], []).append(Scale(name, place))
    return found


def scale_(layer: nn.Module, z: Tensor, place: int | None) -> None:
    """Multiplies what a module gives by gates: its parameters become new ones.

    Args:
        layer: a layer, a norm, or a module with weights of several experts.
        z: the gates.
        place: see `Scale`.
    """
    if place is None:
        for key in last_weights(layer, len(z)):
            _multiply(layer, key, z)
        return
    form = form_of(layer)
    offset = 0.0 if form is None else form.offset
    for key in ("weight", "bias"):
        if layer._parameters.get(key) is not None:
            _multiply(layer, key, z[place].expand(1), offset)


def _multiply(layer: nn.Module, key: str, z: Tensor, offset: float = 0.0) -> None:
    """Multiplies a parameter; what it counts for is more by `offset`."""
    value = layer._parameters[key]
    assert value is not None
    product = scaled(value.detach() + offset, z.detach().to(value.device)) - offset
    layer._parameters[key] = nn.Parameter(product, value.requires_grad)
