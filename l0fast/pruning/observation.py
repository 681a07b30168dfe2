"""What is seen of a model while it runs: what it gives, and what the layers inside it give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from l0fast.graph.calls import Example
from l0fast.graph.capture import is_carrier, is_site
from l0fast.graph.compare import relative_error, values_of
from l0fast.layers.branch import has_branch
from l0fast.layers.dense_types import inner_dims, inputs_first
from l0fast.layers.expert_hooks import multiplies

SAMPLES = 1 << 14
"""How many elements of a layer's output are looked at."""
MATERIAL = 0.1
"""A layer's output is measured against at least this share of what its inputs and weights could
add up to: below it lies rounding."""


@dataclass(frozen=True)
class Rows:
    """Which outputs a smaller layer computes, and where they are."""

    size: int
    """How many outputs the layer had."""
    outputs: tuple[int, ...] | None = None
    """The outputs that it computes, None for all."""
    places: tuple[int, ...] | None = None
    """Where each of them lies in what it gives, None for one after another."""


@dataclass(frozen=True, eq=False)
class _Given:
    """What one call of a layer has given."""

    shape: torch.Size
    sample: Tensor
    known: Tensor | None = None
    """Of the sample, what was computed; None for all."""
    size: float = 0.0
    """What a difference in it is measured against."""


@dataclass(frozen=True, eq=False)
class Observation:
    """What one forward has given."""

    outputs: list[Tensor]
    """The model's, see `values_of`."""
    kind: str
    """Class of what the model gives."""
    layers: dict[str, list[_Given]] = field(default_factory=dict)
    """Linear or convolution -> what each of its calls gave."""

    @property
    def finite(self) -> bool:
        """Whether no output is NaN or infinite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.outputs)

    @property
    def something(self) -> bool:
        """Whether it holds a number at all."""
        layers = (given.sample for calls in self.layers.values() for given in calls)
        return any(bool(torch.isfinite(one).any()) for one in (*self.outputs, *layers))

    def errors(
        self, expected: Observation, names: Mapping[str, str]
    ) -> Iterator[tuple[float, str]]:
        """The relative errors, and where they are: a layer's name, in the order of the calls, then
        "" for the output.

        Of a layer that has lost outputs those that are left are compared; where something else has
        become smaller, or the layer is called another number of times, nothing is.

        Args:
            expected: to compare with.
            names: of the layers there, by their names here.
        """
        for name, calls in self.layers.items():
            others = expected.layers.get(names[name], [])
            if len(calls) == len(others):
                for one, other in zip(calls, others, strict=True):
                    yield _error(one, other), name
        yield relative_error(self.outputs, expected.outputs), ""


def _error(got: _Given, expected: _Given) -> float:
    if got.shape != expected.shape:
        return 0.0
    one, other = got.sample, expected.sample
    if got.known is not None:
        one, other = one[got.known], other[got.known]
    finite = torch.isfinite(other)
    if not torch.equal(torch.isfinite(one), finite):
        return math.inf
    if not bool(finite.any()):
        return 0.0
    difference = float((one - other)[finite].abs().max())
    return difference / expected.size if difference and expected.size else difference


def _in_place(given: Tensor, rows: Rows, dim: int) -> tuple[Tensor, Tensor | None]:
    """What a layer gives with each output where it was at first, and what of it was computed."""
    if rows.outputs is None and rows.places is None:
        return given, None
    if rows.places is not None:
        given = given.index_select(dim, torch.tensor(rows.places, device=given.device))
    index = torch.tensor(
        range(rows.size) if rows.outputs is None else rows.outputs, device=given.device
    )
    shape = list(given.shape)
    shape[dim] = rows.size
    known = torch.zeros(rows.size, dtype=torch.bool, device=given.device)
    known[index] = True
    place = [1] * len(shape)
    place[dim] = -1
    return given.new_zeros(shape).index_copy(dim, index, given), known.view(place).expand(shape)


def _sample(value: Tensor) -> Tensor:
    """A copy of some elements, spread over all of a tensor: what reads it may write into it."""
    flat = value.detach().flatten()
    if len(flat) > SAMPLES:
        step = len(flat) // SAMPLES
        while math.gcd(step, len(flat)) > 1:  # else they lie in a few channels
            step += 1
        flat = flat[torch.arange(SAMPLES, device=flat.device) * step % len(flat)]
    return flat.to("cpu", copy=True)


def _could_be(layer: nn.Module, given: Tensor) -> float:
    """The largest sum that a layer's weights and inputs of this size could make."""
    weight = layer._parameters["weight"]
    assert weight is not None
    weight = weight.detach().transpose(0, 1) if inputs_first(layer) else weight.detach()
    rows = weight.double().flatten(1).abs().sum(1)
    largest = given.detach().abs().max() if given.numel() else 0.0
    return float(rows.max() * largest) if rows.numel() else 0.0


def sites_of(model: nn.Module) -> dict[str, int]:
    """Name of each Linear and ordinary convolution -> the dimension of its outputs, from behind."""
    return {
        name: -1 - (inner_dims(module) or 0)
        for name, module in model.named_modules()
        if is_site(module) and not is_carrier(module)
    }


def _has_gate(layer: nn.Module) -> bool:
    """Whether what a layer gives is multiplied by a gate, of a branch or an expert."""
    return has_branch(layer) or multiplies(layer)


def observe(
    model: nn.Module, example: Example, sites: Mapping[str, int], rows: Mapping[str, Rows] | None
) -> Observation:
    """Runs a model, and looks at what it and its layers give.

    Args:
        model: to run; it may write into the example.
        example: of what it takes.
        sites: the layers, see `sites_of`.
        rows: what is left of the layers; None for a model of full size, whose outputs are measured
            so that other observations can be compared with it.
    """
    layers: dict[str, list[_Given]] = {}

    def note(name: str, layer: nn.Module, args: Any, given: Any) -> None:
        if not isinstance(given, Tensor) or not given.is_floating_point():
            return
        with _disable_current_modes():
            known, size = None, 0.0
            if rows is not None:
                given, known = _in_place(given, rows[name], sites[name])
            sample = _sample(given).double()
            if rows is None:
                size = float(sample.abs().nan_to_num(0.0, 0.0).max()) if len(sample) else 0.0
                if args and isinstance(args[0], Tensor):
                    size = max(size, MATERIAL * _could_be(layer, args[0]))
            elif known is not None:
                known = _sample(known)
        layers.setdefault(name, []).append(_Given(given.shape, sample, known, size))

    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, given, name=name: note(name, layer, args, given),
            prepend=not _has_gate(model.get_submodule(name)),  # it is part of what it gives
        )
        for name in sites
    ]
    try:
        result = example.call(model)
        outputs = [tensor.detach().clone() for tensor in values_of(result)]
    finally:
        for handle in handles:
            handle.remove()
    return Observation(outputs, type(result).__name__, layers)
