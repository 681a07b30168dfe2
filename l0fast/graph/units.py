"""Which unit each element of a tensor belongs to: what `liveness` follows through a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

STAYS = 0
"""The label of what has no unit: it stays where it is."""


@dataclass(frozen=True)
class Units:
    """Who is where in a tensor."""

    labels: Tensor
    """int64, of the tensor's shape: the unit that each element belongs to."""
    constant: Tensor
    """float64, of the tensor's shape: the value that an element always has, or NaN."""


class Ties(Protocol):
    """Where the rules write down which units cannot vanish alone."""

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Elements of the two label tensors, which broadcast, vanish together or not at all."""

    def pin(self, labels: Tensor, reason: str) -> None:
        """These units must exist, with their values."""


Rule = Callable[[Node, Any, Ties], Any]
"""(node, Units of each node among its arguments, ties) -> Units, a list of them, or None where
the units cannot be followed."""


def unknown(shape: Sequence[int]) -> Units:
    """A tensor of which nothing is known."""
    return Units(
        torch.tensor(STAYS).expand(shape), torch.tensor(math.nan, dtype=torch.float64).expand(shape)
    )


def _equal(first: Tensor, second: Tensor) -> Tensor:
    return (first == second) | ((first != first) & (second != second))


def narrowed(values: Tensor) -> Tensor:
    """The tensor with size 1 wherever it does not vary along a dimension."""
    for dim, size in enumerate(values.shape):
        if size <= 1:
            continue
        first = values.narrow(dim, 0, 1)
        if values.stride(dim) == 0 or bool(_equal(values, first).all()):
            values = first
    return values


def varying(values: Tensor) -> list[int]:
    """The dimensions along which a tensor varies."""
    return [dim for dim, size in enumerate(narrowed(values).shape) if size > 1]
