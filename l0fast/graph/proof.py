"""Whether two models compute the same function: on the user's example and on noise of its shape."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest relative error by the least precise dtype that a model computes in."""

SEED = 0


@contextmanager
def _own_randomness(model: nn.Module) -> Generator[None]:
    """The same random numbers every time, and none taken from the user's generators."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        torch.manual_seed(SEED)
        yield


class _Precision(TorchDispatchMode):
    """Notes the least precise floating dtype among the results of all ops."""

    def __init__(self) -> None:
        super().__init__()
        self.least = torch.float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if tensor.is_floating_point():
                eps = torch.finfo(tensor.dtype).eps
                if eps > torch.finfo(self.least).eps:
                    self.least = tensor.dtype
        return result


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return []


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    """max |got - expected| / max |expected|, the largest over the tensors; inf if they differ in
    number, shape, or in where they are NaN or infinite."""
    if len(got) != len(expected):
        return math.inf
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape or one.dtype != other.dtype:
            return math.inf
        if not one.numel():
            continue
        if not (other.is_floating_point() or other.is_complex()):
            if not torch.equal(one, other):
                return math.inf
            continue
        wide = torch.complex128 if other.is_complex() else torch.float64
        one, other = one.to("cpu", wide), other.to("cpu", wide)
        finite = torch.isfinite(other)
        same = torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
        if not bool((torch.isfinite(one) == finite).all()) or not bool((same | finite).all()):
            return math.inf
        if bool(finite.any()):
            difference = float((one - other)[finite].abs().max())
            size = float(other[finite].abs().max())
            if difference:
                worst = max(worst, difference / size if size else math.inf)
    return worst


class Proof:
    """What a model computes, to compare others with it.

    Args:
        model: in evaluation; it is run, and not kept.
        args: its example.

    Attributes:
        tolerance: the largest relative error that counts as equal.

    Raises:
        Exception: whatever the model raises on its example.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        self.probes = [args]
        with _Precision() as precision:
            self.expected = [self._run(model, args)]
        self.tolerance = TOLERANCE.get(precision.least, TOLERANCE[torch.bfloat16])
        noise = self._noise(args)
        if noise is not None:
            try:
                outputs = self._run(model, noise)
            except Exception:
                return  # not every input is one that a model takes
            if all(bool(torch.isfinite(tensor).all()) for tensor in outputs):
                self.probes.append(noise)
                self.expected.append(outputs)

    @staticmethod
    def _noise(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with noise in their floating tensors, or None if they have none."""
        found = [t for t in tensors_of(args) if t.is_floating_point()]
        if not found:
            return None
        generator = torch.Generator().manual_seed(SEED)

        def draw(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return torch.randn(value.shape, generator=generator).to(value)

        return tree_map(draw, args)

    @staticmethod
    def _run(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
        own = copy.deepcopy(args)  # a model may write into its input
        with torch.no_grad(), _own_randomness(model):
            return [tensor.detach().clone() for tensor in tensors_of(model(*own))]

    def error(self, model: nn.Module) -> float:
        """The relative error of another model; whatever it raises is passed on."""
        pairs = zip(self.probes, self.expected, strict=True)
        return max(relative_error(self._run(model, args), outputs) for args, outputs in pairs)


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with their floating tensors in float64."""

    def widen(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(torch.float64) if floating else value

    return tree_map(widen, args)
