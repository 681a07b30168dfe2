"""Which unit each element of a tensor belongs to: what `liveness` follows through a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

STAYS = 0
"""The label of what has no unit: it stays where it is."""


@dataclass(frozen=True)
class Units:
    """Who is where in a tensor.

    Both tensors are expanded views: they take memory only along the dimensions where they vary.
    """

    labels: Tensor
    """int64, of the tensor's shape: the unit that each element belongs to."""
    constant: Tensor
    """float64, of the tensor's shape: the value that an element always has, or NaN."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", _expanded(self.labels))
        object.__setattr__(self, "constant", _expanded(self.constant))

    @cached_property
    def followed(self) -> bool:
        """Whether any unit of a layer is in the tensor."""
        return bool((narrowed(self.labels) != STAYS).any())

    def along(self, dim: int) -> Units | None:
        """The units along one dimension, as vectors, if they vary along no other."""
        vectors: list[Tensor] = []
        for values in (self.labels, self.constant):
            narrow = narrowed(values)
            if narrow.numel() != narrow.shape[dim]:
                return None
            vectors.append(narrow.flatten().expand(values.shape[dim]))
        return Units(*vectors)

    def same_as(self, other: Units) -> bool:
        """Whether the same is known of another tensor."""
        for mine, its in ((self.labels, other.labels), (self.constant, other.constant)):
            one, two = narrowed(mine), narrowed(its)
            if mine.shape != its.shape or one.shape != two.shape or bool(_apart(one, two).any()):
                return False
        return True


class Ties(Protocol):
    """Where the rules write down which units cannot vanish alone."""

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Elements of the two label tensors, which broadcast, vanish together or not at all."""

    def pin(self, labels: Tensor, reason: str) -> None:
        """These units must exist, with their values."""

    def together(self, first: Tensor, second: Tensor) -> Tensor:
        """bool: where elements of the two label tensors, which broadcast, are tied by now."""
        ...

    def is_held(self, labels: Tensor) -> bool:
        """Whether all of them belong to tensors of modules, and not to layers."""
        ...


Rule = Callable[[Node, Any, Ties], Any]
"""(node, Units of each node among its arguments, ties) -> Units, a list of them, or None where
the units cannot be followed."""


def unknown(shape: Sequence[int]) -> Units:
    """A tensor of which nothing is known."""
    return Units(
        torch.tensor(STAYS).expand(shape), torch.tensor(math.nan, dtype=torch.float64).expand(shape)
    )


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """Where two tensors differ; NaN counts as equal to NaN."""
    apart = first != second
    if first.is_floating_point():
        apart &= (first == first) | (second == second)
    return apart


def _varies(values: Tensor, dim: int) -> bool:
    """Whether a tensor is not the same all along one dimension."""
    first = values.narrow(dim, 0, 1)
    # Mostly, the first two tell.
    return any(bool(_apart(first, o).any()) for o in (values.narrow(dim, 1, 1), values))


def _without_repeats(values: Tensor) -> Tensor:
    """The tensor with size 1 along the dimensions that repeat the same memory."""
    for dim, size in enumerate(values.shape):
        if size > 1 and values.stride(dim) == 0:
            values = values.narrow(dim, 0, 1)
    return values


def narrowed(values: Tensor) -> Tensor:
    """The tensor with size 1 wherever it does not vary along a dimension."""
    values = _without_repeats(values)
    for dim, size in enumerate(values.shape):
        if size > 1 and not _varies(values, dim):
            values = values.narrow(dim, 0, 1)
    return values


def _expanded(values: Tensor) -> Tensor:
    """The same tensor as a view that takes memory only along the dimensions where it varies."""
    stored, narrow = _without_repeats(values), narrowed(values)
    if narrow.numel() < stored.numel():
        narrow = narrow.clone()  # a view would keep the memory of all of it
    return narrow.expand(values.shape)


def in_all(calls: Sequence[Units], unsure: Tensor) -> Units:
    """The units of the first of several tensors, with the constants that all of them have.

    Args:
        calls: vectors.
        unsure: bool, by unit: it may no longer be the constant that it was.
    """
    constant = calls[0].constant.clone()
    for units in calls:
        constant[unsure[units.labels] | (units.constant != constant)] = math.nan
    return replace(calls[0], constant=constant)


def grids_of(tensors: Iterable[Units], classes: Tensor) -> list[Tensor]:
    """Classes of the units of each tensor that has them along several dimensions.

    Args:
        tensors: of a graph.
        classes: unit -> its class.
    """
    found: dict[Any, Tensor] = {}
    for units in tensors:
        labels = narrowed(units.labels)
        key = labels.data_ptr(), labels.shape, labels.stride()
        if _is_grid(labels) and key not in found:
            found[key] = narrowed(classes[labels])
    return [grid for grid in found.values() if _is_grid(grid)]


def _is_grid(narrow: Tensor) -> bool:
    return sum(size > 1 for size in narrow.shape) > 1


def varying(values: Tensor) -> list[int]:
    """The dimensions along which a tensor varies."""
    return [dim for dim, size in enumerate(narrowed(values).shape) if size > 1]


def groups_of_dims(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """The runs of dimensions, before and after a reshape, that hold as many elements."""
    first, other = 0, 0
    while first < len(before) and other < len(after):
        end, stop = first + 1, other + 1
        while (size := math.prod(before[first:end])) != (into := math.prod(after[other:stop])):
            end, stop = (end + 1, stop) if size < into else (end, stop + 1)
        yield slice(first, end), slice(other, stop)
        first, other = end, stop


def reshaped(values: Tensor, shape: Sequence[int]) -> Tensor:
    """values.reshape(shape), where only dimensions along which it varies take memory."""
    if 0 in shape or math.prod(shape) != values.numel():
        return values.reshape(shape)
    narrow, before, after = _without_repeats(values), list(values.shape), list(shape)
    for dims, into in groups_of_dims(before, shape):
        if all(size == 1 for size in narrow.shape[dims]):
            after[into] = [1] * len(after[into])
        else:
            sizes = [*narrow.shape[: dims.start], *before[dims], *narrow.shape[dims.stop :]]
            narrow = narrow.expand(sizes)
    return narrow.reshape(after).expand(shape)
