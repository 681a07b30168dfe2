"""Ways to units: which gates must be open for a unit to be read, or to be there."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Ways(NamedTuple):
    """Ways to units: each is open while all of some gates are, and one of some others.

    Gates go by number, through all layers; two more follow, see `GateDependencies`.
    """

    all_of: Tensor
    """[..., A]"""
    any_of: Tensor
    """[..., B]"""

    def once_open(self, gate: Tensor, always: int) -> Ways:
        """The same ways where one gate is known to be open; `gate` broadcasts to both."""
        return Ways(*(part.masked_fill(part == gate, always) for part in self))

    def within(self, gates: Tensor, always: int) -> Ways:
        """The same ways where several gates, [..., D], are known to be open."""
        ways = self
        for gate in gates.unbind(-1):
            place = [1] * (self.all_of.dim() - gate.dim())
            ways = ways.once_open(gate.view(*gate.shape, *place), always)
        return ways


def smallest(classes: Tensor) -> int:
    """How many units the smallest of some classes has."""
    return int(classes.unique(return_counts=True)[1].min())
