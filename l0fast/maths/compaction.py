"""Which units are open, as a list that stays on the device: the reference of the compaction kernel.

A list has the length of all units, so that nothing about its shape depends on the gates: the open
ones come first, and `count` says how many they are. Who rounds the count up reads units that are
closed, valid and all different.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MULTIPLE = 64
"""Counts are rounded up to it: the kernels' step along the units that a product sums over."""


class Order(NamedTuple):
    """The units of one layer, open ones first."""

    index: Tensor
    """int32 [N]: the open units, ascending, then the closed ones, descending."""
    place: Tensor
    """int32 [N]: where each unit stands in `index`."""
    count: Tensor
    """int32 [1]: how many are open."""


def compaction(alive: Tensor, sizes: tuple[int, ...]) -> list[Order]:
    """The order of each segment's units.

    Args:
        alive: bool [N], the segments end to end.
        sizes: the segments' lengths, with sum N.
    """
    orders: list[Order] = []
    for part in alive.split(sizes):
        opens, units = part.int(), torch.arange(len(part), dtype=torch.int32, device=part.device)
        front = opens.cumsum(0) - 1
        back = len(part) - (1 - opens).cumsum(0)
        place = torch.where(part, front, back)
        index = torch.empty_like(units).scatter_(0, place, units)
        orders.append(Order(index, place.int(), opens.sum(dtype=torch.int32).view(1)))
    return orders


def bound(count: Tensor, size: int) -> Tensor:
    """int [1]: `count` rounded up to MULTIPLE, at most `size`."""
    return ((count + (MULTIPLE - 1)) // MULTIPLE * MULTIPLE).clamp_max(size)


def below(order: Order | None, size: int, device: torch.device) -> Tensor:
    """bool [size]: the places before the rounded count; all of them without an order."""
    places = torch.arange(size, dtype=torch.int32, device=device)
    return places < (size if order is None else bound(order.count, size))
