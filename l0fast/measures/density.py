"""How dense a model is: expected and realised, by layer and in all; parameters and MACs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast._tables import aligned
from l0fast.graph.calls import evaluating, example_args
from l0fast.layers.draw import gated_layers
from l0fast.layers.gated import Gated
from l0fast.measures.amounts import Asked, check
from l0fast.measures.latency import LatencyTable

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


AnyMeasure = str | Cost | LatencyTable
"""The name of a measure, a cost of the user's own, or a table of seconds."""


def measure_name(measure: AnyMeasure) -> str:
    """What reports and messages call a measure."""
    if isinstance(measure, LatencyTable):
        return "latency"
    return measure if isinstance(measure, str) else getattr(measure, "__name__", "cost")


class Group(NamedTuple):
    """What one target is about."""

    layers: tuple[str, ...]
    """The gated layers."""
    measure: AnyMeasure = "gates"
    whole: str | None = None
    """The module that is measured as a whole, with all in it that has no gates ("" is the model);
    None: the layers alone."""


def target_groups(
    model: nn.Module, target: Asked | Mapping[str, Asked], measure: AnyMeasure = "gates"
) -> dict[str, tuple[Group, Asked]]:
    """Group name -> (group, target as asked): one group for a number, or one for each key.

    A key is a layer's name or a glob pattern. Refused: an unknown key, a layer in two groups, a
    number that is no density, an amount of something else.
    """
    layers, by = require_gated(model), measure_name(measure)
    if not isinstance(target, Mapping):
        whole = None if measure == "gates" else ""
        group = Group(tuple(layers), measure, whole)
        return {WHOLE_MODEL: (group, check("target", target, by))}
    if callable(measure):
        _checks.refuse("target", target, "one number, for a cost of your own", TypeError)
    if not target:
        _checks.refuse("target", target, "at least one layer or pattern")
    groups: dict[str, tuple[Group, Asked]] = {}
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
        groups[key] = Group(matched, measure), check(f"target[{key!r}]", value, by)
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
    return {name: flops // 2 for name, flops in _counted(model, example_inputs).items()}


def count_activations(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Elements that the layers of a model give in one forward on `example_inputs`, by module name
    ("" is all): the outputs of Linears, convolutions, batch norms and products of matrices.

    Source: Radosavovic et al., 2020 (activations: the size of the output tensors of layers).
    """
    from torch.utils.flop_counter import flop_registry

    def elements(*_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
        return math.prod(out_shape if isinstance(out_shape[0], int) else out_shape[0])

    norms = (op for name in BATCH_NORMS if (op := getattr(torch.ops.aten, name, None)))
    return _counted(model, example_inputs, dict.fromkeys([*flop_registry, *norms], elements))


BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")


def _counted(model: nn.Module, example_inputs: Any, formulas: Any = None) -> dict[str, int]:
    """What the ops of one forward sum up to, by module name; by default their FLOPs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # it loads Triton

    fused = torch.backends.mha.get_fastpath_enabled()
    names = {id(module): name for name, module in model.named_modules()}
    root = type(model).__name__
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    try:
        # Attention in one fused op would count for nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(*example_args(example_inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    counts = counter.get_flop_counts()
    found = {name: sum(counts.get(f"{root}.{name}", {}).values()) for name in names.values()}
    return found | {"": counter.get_total_flops()}


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
