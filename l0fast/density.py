"""How dense a model is: expected and realised, by layer and in all; parameters and MACs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast._tables import aligned
from l0fast.draw import gated_layers
from l0fast.layers import Gated
from l0fast.sparsify import evaluating, example_args

WHOLE_MODEL = "model"
"""The name of the one group that holds every gated layer."""


def require_gated(model: nn.Module) -> dict[str, Gated]:
    """Name -> gated layer; refused if the model has none."""
    layers = gated_layers(model)
    if not layers:
        _checks.refuse("model", type(model).__name__, "a model with gates (see sparsify_)")
    return layers


Cost = Callable[[Mapping[str, Tensor]], Tensor]
"""A cost of the user's own: open probabilities of each layer's gates, by name -> 0-d."""


class Group(NamedTuple):
    """What one target is about."""

    layers: tuple[str, ...]
    """The gated layers."""
    measure: str | Cost = "gates"
    whole: str | None = None
    """The module that is measured as a whole, with all in it that has no gates ("" is the model);
    None: the layers alone."""


def target_groups(
    model: nn.Module, target: float | Mapping[str, float], measure: str | Cost = "gates"
) -> dict[str, tuple[Group, float]]:
    """Group name -> (group, target): one group for a number, or one for each key.

    A key is a layer's name or a glob pattern. Refused: an unknown key, a layer in two groups, a
    number that is no density.
    """
    layers = require_gated(model)
    if not isinstance(target, Mapping):
        whole = None if measure == "gates" else ""
        group = Group(tuple(layers), measure, whole)
        return {WHOLE_MODEL: (group, _checks.density("target", target))}
    if callable(measure):
        _checks.refuse("target", target, "one number, for a cost of your own", TypeError)
    if not target:
        _checks.refuse("target", target, "at least one layer or pattern")
    groups: dict[str, tuple[Group, float]] = {}
    owner: dict[str, str] = {}
    for key, value in target.items():
        if not isinstance(key, str):
            _checks.refuse("target", key, "layer names or patterns as keys", TypeError)
        matched = tuple(name for name in layers if fnmatchcase(name, key))
        if not matched:
            _checks.refuse("target", key, f"a pattern that matches one of {list(layers)}")
        for name in matched:
            if name in owner:
                _checks.refuse(
                    "target", key, f"layers of one group only ({name!r} is in {owner[name]!r})"
                )
            owner[name] = key
        groups[key] = Group(matched, measure), _checks.density(f"target[{key!r}]", value)
    return groups


def gated_parameters(layers: list[Gated]) -> int:
    """How many parameters the gates of `layers` control."""
    return sum(layer.all_gates * layer.group_size for layer in layers)


def count_params(model: nn.Module) -> int:
    """Parameters of a model, each tensor once; the gates' log_alpha do not count."""
    gates = {id(layer.log_alpha) for layer in gated_layers(model).values()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def count_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Multiply-accumulates of one forward on `example_inputs`, by module name ("" is all).

    Matrix products and convolutions count, as `torch.utils.flop_counter` does.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # it loads Triton

    fused = torch.backends.mha.get_fastpath_enabled()
    names = {id(module): name for name, module in model.named_modules()}
    root = type(model).__name__
    counter = FlopCounterMode(display=False)
    try:
        # Attention in one fused op would count for nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(*example_args(example_inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    counts = counter.get_flop_counts()
    macs = {name: sum(counts.get(f"{root}.{name}", {}).values()) // 2 for name in names.values()}
    macs[""] = counter.get_total_flops() // 2
    return macs


@dataclass(frozen=True)
class LayerDensity:
    """A row of the table: one gated layer, or all of them."""

    name: str
    gates: str
    open_gates: int
    num_gates: int
    expected: float
    """Expected L0 / gated parameters."""
    realised: float
    """The same with the evaluation gates: parameters of open gates / gated parameters."""
    params: int
    """Gated parameters."""
    macs: int | None
    """Multiply-accumulates of the layer, all gates open, for the examples given."""


@dataclass(frozen=True)
class DensityTable:
    """What `density` returns: a row for each gated layer, and one for all; prints as a table."""

    layers: tuple[LayerDensity, ...]
    total: LayerDensity

    def __str__(self) -> str:
        head = ("layer", "gates", "open", "of", "expected", "realised", "params", "MACs")
        rows: list[tuple[str, ...]] = [head]
        for row in (*self.layers, self.total):
            macs = "-" if row.macs is None else f"{row.macs:,}"
            densities = f"{row.expected:.4f}", f"{row.realised:.4f}"
            counts = str(row.open_gates), str(row.num_gates)
            rows.append((row.name, row.gates, *counts, *densities, f"{row.params:,}", macs))
        return "\n".join(aligned(rows, left=2))


def density(model: nn.Module, example_inputs: Any = None) -> DensityTable:
    """The density of a model with gates: a table, by layer and in all.

    Args:
        model: a model with gates.
        example_inputs: what its forward takes; where given, the table has MACs.

    Returns:
        DensityTable(layers, total), which prints as a table.

    Raises:
        ValueError: the model has no gates.
    """
    layers = require_gated(model)
    macs = None if example_inputs is None else count_macs(model, example_inputs)
    rows: list[LayerDensity] = []
    with torch.no_grad():
        for name, layer in layers.items():
            open_gates = int((layer.evaluation_gates() > 0).sum())
            rows.append(
                LayerDensity(
                    name=name,
                    gates=layer.gates,
                    open_gates=open_gates,
                    num_gates=layer.all_gates,
                    expected=float(layer.open_probability().double().sum()) / layer.all_gates,
                    realised=open_gates / layer.all_gates,
                    params=layer.all_gates * layer.group_size,
                    macs=None if macs is None else macs[name],
                )
            )
    params = sum(row.params for row in rows)
    total = LayerDensity(
        name="total",
        gates="",
        open_gates=sum(row.open_gates for row in rows),
        num_gates=sum(row.num_gates for row in rows),
        expected=sum(row.expected * row.params for row in rows) / params,
        realised=sum(row.realised * row.params for row in rows) / params,
        params=params,
        macs=None if macs is None else sum(row.macs or 0 for row in rows),
    )
    return DensityTable(tuple(rows), total)
