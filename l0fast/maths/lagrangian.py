"""The Lagrangian term of "shares at most their targets", and the ascent of its multipliers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Falling(NamedTuple):
    """How targets come down (see `constraints.schedule`)."""

    start: Tensor
    """[C] where they begin."""
    taken: Tensor
    """0-d: how many steps there have been."""
    steps: int
    """In so many they come down."""
    power: int

    def to(self, target: Tensor) -> Tensor:
        """[C] targets in force, on their way to `target`.

        Equals: target + (max(start, target) - target) * max(0, 1 - taken / steps) ** power
        """
        left = (1 - self.taken / self.steps).clamp_(min=0.0)
        return torch.lerp(target, torch.maximum(self.start, target), left**self.power)


def shares(counts: Tensor, weights: Tensor) -> Tensor:
    """[C] sums of counts [L] by weights [C, L]."""
    # Not a product of matrices: autocast would halve its dtype.
    if len(weights) == 1:
        return torch.dot(weights.view(-1), counts).view(1)
    return (weights * counts).sum(1)


def lagrangian(
    counts: Tensor,
    weights: Tensor,
    multiplier: Tensor,
    target: Tensor,
    falling: Falling | None = None,
) -> tuple[Tensor, Tensor]:
    """(term 0-d, violation [C]), of counts [L], weights [C, L], multipliers and targets [C].

    Equals:
        violation = weights @ counts - target             # the target in force, if it is falling
        term = multiplier @ violation
    """
    violation = shares(counts, weights) - (target if falling is None else falling.to(target))
    return torch.dot(multiplier, violation), violation


def lagrangian_backward(dterm: Tensor, weights: Tensor, multiplier: Tensor) -> Tensor:
    """dcounts [L]. Equals: dterm * (multiplier @ weights)"""
    return dterm * shares(multiplier, weights.t())


def ascend_(
    multiplier: Tensor, violation: Tensor, restarts: Tensor, lr: Tensor, limit: float
) -> None:
    """One step of projected ascent with dual restarts, in place; all are [C], lr is 0-d.

    Equals, for multipliers >= 0:
        restarts = restarts + (violation < 0 and multiplier > 0)
        multiplier = min(max(0, multiplier + lr * violation), limit)
        multiplier = 0 where violation < 0
    """
    satisfied = violation < 0
    restarts.addcmul_(satisfied, multiplier.sign())
    # It stays >= 0: where the constraint is not satisfied, the violation is >= 0.
    multiplier.addcmul_(violation, lr).masked_fill_(satisfied, 0.0)
    if limit < math.inf:
        multiplier.clamp_max_(limit)
