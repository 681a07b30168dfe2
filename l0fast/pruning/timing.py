"""Measuring a model's latency table: each layer, at a grid of widths, on the model's device."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast.graph.calls import Example, evaluating, unwrapped
from l0fast.graph.capture import groups_of, is_carrier, is_channelwise, layer_size
from l0fast.graph.sharding import on_full_weights
from l0fast.graph.sites import light_copy
from l0fast.graph.sites import replace as replace_modules
from l0fast.layers.dense_types import kind_of
from l0fast.layers.handle import gates
from l0fast.measures.groups import AnyMeasure
from l0fast.measures.latency import Grids, LatencyTable, LayerLatency
from l0fast.measures.measure import check_measure
from l0fast.measures.trial import Trial
from l0fast.pruning.draft import opened
from l0fast.pruning.edits import Edit, apply, channel_dim, edited
from l0fast.pruning.plan import Plan
from l0fast.pruning.stopwatch import Build, Call, device_of, quartiles, whole
from l0fast.pruning.trial import tried

POINTS = 5
"""Widths along each side of a layer."""


@on_full_weights
def measure_latency(model: nn.Module, example_inputs: Any) -> LatencyTable:
    """Times every layer of a model at a grid of widths, on the model's own device and threads.

    Each layer that `prune` can make smaller runs in evaluation on the example's shapes, at five
    widths along each side, with the gathers and scatters that pruning would put around it. Its time
    is the lower quartile of interleaved samples. The time outside of these layers comes from two
    whole models, dense and about half pruned, each timed with and without its layers.

    Args:
        model: a model with gates.
        example_inputs: what its forward takes: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments. Times are for its batch size.

    Returns:
        LatencyTable, for `DensityConstraint(measure=...)` and `prune(measure=...)`.

    Raises:
        ValueError: no gates, or an example that the model does not take.

    >>> x = torch.randn(2, 8)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> table = l0fast.measure_latency(l0fast.sparsify_(model, example_inputs=x), x)
    >>> table.layers["0"].outputs  # the widths at which the layer was timed
    [1, 4, 8, 12, 16]
    >>> table.save("latency.json")
    """
    model = unwrapped(model)
    gates(model)
    example = Example.of(example_inputs, model)
    trial, plan = tried(model, example)
    dense = opened(model, trial.structure.raw(gates(model).layers))
    small = apply(light_copy(dense.eval()), list(plan.edits), plan.patches)
    return _table(trial, plan, [dense, small], example)


def with_table(measure: AnyMeasure, model: nn.Module, example_inputs: Any) -> AnyMeasure:
    """A checked measure; "latency" is measured now."""
    check_measure(measure, example_inputs)
    return measure_latency(model, example_inputs) if measure == "latency" else measure


class _Recorded(nn.Module):
    """Gives what a layer gave, call by call, and takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.calls = 0

    def hook(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Of the layer itself."""
        (given,) = (*args, *kwargs.values())
        self.inputs.append(given)
        self.outputs.append(output)

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return self.outputs[(self.calls - 1) % len(self.outputs)]


def _recorded(model: nn.Module, names: list[str], example: Example) -> dict[str, _Recorded]:
    """What some layers are given and give in one forward, by name."""
    records = {name: _Recorded() for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(record.hook, with_kwargs=True)
        for name, record in records.items()
    ]
    with evaluating(model):
        example.call(model)
    for hook in hooks:
        hook.remove()
    return records


def _table(tried: Trial, plan: Plan, models: list[nn.Module], example: Example) -> LatencyTable:
    """The table of a model that was tried; of the plain models with all units, and with those that
    the trial left."""
    edits = {edit.name: edit for edit in plan.edits}
    records = [_recorded(model, list(tried.shrinking), example) for model in models]
    empty: list[nn.Module] = []
    for model, of in zip(models, records, strict=True):
        twin = light_copy(model)
        layers_of = {id(twin.get_submodule(name)): record for name, record in of.items()}
        empty.append(replace_modules(twin, layers_of))
    builds = [whole([*models, *empty], example)]
    number = 4
    alike: dict[str, _Sides] = {}  # networks repeat their blocks
    kinds: dict[str, str] = {}
    for name, record in records[0].items():
        layer = models[0].get_submodule(name)
        edit = edits.get(name, Edit(name, kind_of(layer).__name__, layer_size(layer)))
        shapes = [(x.shape, x.stride(), x.dtype) for x in record.inputs]
        smaller = [part is None for part in (edit.inputs, edit.outputs, edit.gather, edit.scatter)]
        kinds[name] = repr((layer, shapes, smaller))
        if kinds[name] not in alike:
            alike[kinds[name]] = sides = _Sides(*_widths(layer, edit), number)
            number += len(sides.inputs) * len(sides.outputs)
            builds.append(_cells(layer, record.inputs, edit, sides))
    with torch.no_grad():
        seconds = quartiles(builds, device_of(models[0]))
    layers = {name: alike[kind].layer(seconds) for name, kind in kinds.items()}
    positions = {
        name: sum(y.numel() for y in record.outputs) / tried.dense.widths[name][1]
        for name, record in records[0].items()
    }
    about = {
        "device": _device_name(device_of(models[0])),
        "threads": torch.get_num_threads(),
        "dtypes": [str(part.dtype) for part in example.tensors()],
        "shapes": [list(part.shape) for part in example.tensors()],
        "torch": str(torch.__version__),  # a checkpoint loads plain text alone
    }
    return LatencyTable(*_completed(layers, positions, tried, seconds), about)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Sides(NamedTuple):
    """The widths at which a layer is timed, and where in all calls its own begin."""

    inputs: list[int]
    outputs: list[int]
    start: int

    def layer(self, seconds: list[float]) -> LayerLatency:
        """The layer's table, from the seconds of all calls."""
        own = torch.tensor(seconds[self.start :][: len(self.inputs) * len(self.outputs)])
        own = own.double().view(len(self.inputs), -1)
        # A wider layer is never reckoned faster, whatever a sample or a kernel says.
        own = own.cummax(0).values.cummax(1).values
        return LayerLatency(self.inputs, self.outputs, own.tolist())


def _widths(layer: nn.Module, edit: Edit) -> tuple[list[int], list[int]]:
    """Widths along both sides of a layer, from one unit to all where it gets smaller."""
    (inputs, outputs), groups = layer_size(layer), groups_of(layer)

    def grid(size: int, step: int) -> list[int]:
        shares = (index / (POINTS - 1) for index in range(POINTS))
        return sorted({step * max(1, round(share * (size // step))) for share in shares})

    rows = (
        [outputs] if edit.outputs is None else grid(outputs, outputs // groups if groups > 1 else 1)
    )
    if is_carrier(layer) or edit.inputs is None:  # a carrier is given what it passes on
        return [inputs], rows
    return grid(inputs, 1), rows


def _cells(layer: nn.Module, given: list[Tensor], edit: Edit, sides: _Sides) -> Build:
    """A layer at each pair of widths, called as often as in a forward.

    Args:
        layer: of full size.
        given: what it is called with.
        edit: says what is put around it where it is smaller.
        sides: the widths.
    """
    inputs, outputs = edit.size
    dim = 1 if is_channelwise(layer) else channel_dim(layer)

    def without(move: Any, kept: int, size: int) -> tuple[tuple[int, ...], int] | None:
        return None if move is None or kept == size else (tuple(range(kept)), size)

    def build(kept: tuple[int, int]) -> Call:
        arriving = kept[1] * inputs // outputs if is_carrier(layer) else kept[0]
        part = replace(
            edit,
            inputs=tuple(range(arriving)),
            outputs=tuple(range(kept[1])),
            gather=without(edit.gather, arriving, inputs),
            scatter=without(edit.scatter, kept[1], outputs),
            scale=None,
        )
        if not given:  # the forward leaves it out
            return lambda: None
        small = edited(layer, part)
        whole = part.gather or isinstance(layer, nn.Embedding)
        xs = given if whole else [_narrowed(x, dim, arriving) for x in given]
        return lambda: [small(x) for x in xs]

    return lambda: [build(kept) for kept in product(sides.inputs, sides.outputs)]


def _narrowed(x: Tensor, dim: int, channels: int) -> Tensor:
    """The first channels of what a layer is given, in the same layout."""
    last = x.dim() == 4 and not x.is_contiguous()
    last = last and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return x.narrow(dim, 0, channels).contiguous(memory_format=layout)


def _completed(
    layers: dict[str, LayerLatency],
    positions: dict[str, float],
    tried: Trial,
    seconds: list[float],
) -> tuple[dict[str, LayerLatency], float]:
    """The layers with their part of what is spent besides them, and the rest of that.

    Args:
        layers: timed alone.
        positions: elements of one unit of each layer's output.
        tried: the two models that were timed as wholes, dense and what was left.
        seconds: of both, and then of both without their layers.
    """
    grids = Grids.of(list(layers.values()))
    each = torch.tensor([positions[name] for name in layers], dtype=torch.float64)
    alone: list[float] = []
    given: list[float] = []
    for counts in (tried.dense, tried.left):
        widths = torch.tensor([counts.widths[name] for name in layers], dtype=torch.float64)
        alone.append(float(grids.at(*widths.unbind(1)).sum()))
        given.append(float((each * widths[:, 1]).sum()))
    beside = seconds[2:4]
    slope = max(0.0, beside[0] - beside[1]) / max(1.0, given[0] - given[1])
    rest = max(0.0, beside[0] - slope * given[0])
    # In the midst of a model a layer takes longer than alone, or not as long.
    parts = zip(seconds, beside, alone, strict=False)
    factor = math.prod(max(took - other, 0.1 * took) / layer for took, other, layer in parts) ** 0.5
    done = {
        name: replace(
            layer,
            seconds=[
                [
                    factor * cell + slope * positions[name] * width
                    for cell, width in zip(row, layer.outputs, strict=True)
                ]
                for row in layer.seconds
            ],
        )
        for name, layer in layers.items()
    }
    return done, rest
