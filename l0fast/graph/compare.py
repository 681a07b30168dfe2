"""How far the outputs of two models are from each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest relative error by the least precise dtype that a model computes in."""


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


class Precision(TorchDispatchMode):
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

    @property
    def tolerance(self) -> float:
        """The largest relative error for that dtype."""
        return TOLERANCE.get(self.least, TOLERANCE[torch.bfloat16])


_EMPTY = (str, bytes, type(None), type, nn.Module, FunctionType, MethodType)
"""Classes of what holds no values of a model's output."""


def values_of(value: Any) -> list[Tensor]:
    """The tensors and numbers in what a model gives, in order, as strided tensors.

    They are looked for in containers, in iterators (which are used up), and in the attributes of
    objects of any class; only a decoder's cache is left out, which shrinks with its heads.
    """
    return _values(value, set())


def _values(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        if value.is_nested:
            return list(value.unbind())
        return [value if value.layout is torch.strided else value.to_dense()]
    if isinstance(value, (bool, int, float, complex)):
        return [torch.tensor(value)]
    cache = any(kind.__name__ == "Cache" for kind in type(value).__mro__)
    if isinstance(value, _EMPTY) or cache or id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, Iterable) and not hasattr(value, "__dict__"):
        parts = list(value)
    else:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        names = [*getattr(value, "__dict__", {}), *slots]
        parts = [getattr(value, name) for name in names if hasattr(value, name)]
        if isinstance(value, (tuple, list)):
            parts += list(value)
    return [tensor for part in parts for tensor in _values(part, seen)]


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
