"""How the multipliers of the constraints move: one small interface, four rules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from l0fast import _checks


@dataclass(frozen=True)
class Dual:
    """What every rule has: a term of the loss, and a step for the multipliers after it.

    A rule of your own derives from this. It holds numbers only: the multipliers, and whatever
    `memory` names, are buffers of the constraint, so that they move, and are saved, with it.

    Args:
        lr: dual learning rate, >= 0.
        limit: the highest multiplier, > 0; none by default. A multiplier that has grown while the
            gates could not follow goes on closing them after the target is met, unless a restart
            takes it away. All rules here move the multiplier itself, with no integral behind it,
            so that a bound on it is all the anti-windup there is to do. A place to start: above
            (loss of a model that knows nothing) / target even a perfect model within its target
            has a higher Lagrangian than one with all gates closed. (Gates that are far open feel
            little of it, and have taken more than ten times that on their way.)
        dual_first: alternating updates: the multipliers move by the violation of the current step
            as its term is formed, and not by `step()` after it. No further forward is needed: the
            expected densities hang on the gates' parameters alone.

    Raises:
        ValueError, TypeError: a number is out of its range.
    """

    lr: float = 1e-3
    limit: float = field(default=math.inf, kw_only=True)
    dual_first: bool = field(default=False, kw_only=True)

    memory: ClassVar[tuple[str, ...]] = ()
    """Names of the [C] buffers that `term` and `step_` are given, in this order; all start at 0."""

    def __post_init__(self) -> None:
        _checks.number("lr", self.lr, "a number >= 0", low=0.0)
        if self.limit != math.inf:
            _checks.number("limit", self.limit, "a number > 0", low=0.0, open_low=True)
        if not isinstance(self.dual_first, bool):
            _checks.refuse("dual_first", self.dual_first, "True or False", TypeError)

    def term(self, multiplier: Tensor, violation: Tensor, *memory: Tensor) -> Tensor:
        """0-d: what is added to the loss; `violation` [C] is density - target, differentiable."""
        return torch.dot(multiplier, violation)

    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor) -> None:
        """Moves `multiplier` [C] and the memory, in place, by `lr` (0-d); called without autograd,
        and without a host sync."""
        raise NotImplementedError


@dataclass(frozen=True)
class DualAscent(Dual):
    """Projected gradient ascent on the multipliers, with dual restarts.

    Equals, for each constraint:
        multiplier = min(max(0, multiplier + lr * violation), limit)
        multiplier = 0 where violation < 0              # a dual restart

    Args:
        lr, limit, dual_first: see `Dual`.
        restarts: whether a multiplier is set to 0 as soon as its constraint is strictly
            satisfied.

    Raises:
        ValueError, TypeError: a number is out of its range.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (dual restarts).
    """

    restarts: bool = True
    memory: ClassVar[tuple[str, ...]] = ("restarts",)

    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor) -> None:
        """One ascent step; a multiplier that a restart sets from above 0 to 0 counts one in
        `memory`, the restarts so far."""
        if self.restarts:
            (restarts,) = memory
            satisfied = violation < 0
            restarts.addcmul_(satisfied, multiplier.sign())
            multiplier.masked_fill_(satisfied, 0.0)
        multiplier.addcmul_(violation, lr).clamp_(0.0, self.limit)


@dataclass(frozen=True)
class PIControl(Dual):
    """Proportional-integral control of the multipliers (nuPI).

    Equals, for each constraint, from smoothed = 0:
        before, smoothed = smoothed, smoothing * smoothed + (1 - smoothing) * violation
        multiplier = multiplier + lr * violation + proportional * (smoothed - before)
        multiplier = min(max(0, multiplier), limit)
    The proportional part takes pressure away while the violation still falls, before the
    integral could: less overshoot. proportional = 0 is `DualAscent` without restarts.

    Args:
        lr, limit, dual_first: see `Dual`; lr is the integral gain, kappa_i.
        proportional: the proportional gain, kappa_p, >= 0: multiplier per violation.
        smoothing: nu, of the moving average of the violation, in [0, 1).

    Raises:
        ValueError, TypeError: a number is out of its range.

    Source: Sohrabi, Ramirez, Zhang, Lacoste-Julien, Gallego-Posada, 2024, algorithm 1, with the
    multipliers kept >= 0.
    """

    proportional: float = 1.0
    smoothing: float = 0.0
    memory: ClassVar[tuple[str, ...]] = ("smoothed",)

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.number("proportional", self.proportional, "a number >= 0", low=0.0)
        expected = "a number in [0, 1)"
        _checks.number("smoothing", self.smoothing, expected, low=0.0, high=1.0, open_high=True)

    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor) -> None:
        (smoothed,) = memory
        change = (violation - smoothed).mul_(1 - self.smoothing)
        smoothed.add_(change)
        multiplier.addcmul_(violation, lr).add_(change, alpha=self.proportional)
        multiplier.clamp_(0.0, self.limit)


@dataclass(frozen=True)
class AugmentedLagrangian(Dual):
    """The augmented Lagrangian: a quadratic term beside the multiplier's, in the loss.

    Equals:
        term = (max(0, multiplier + penalty * violation)^2 - multiplier^2).sum() / (2 * penalty)
        multiplier = min(max(0, multiplier + lr * violation), limit)
    so that the gates feel max(0, multiplier + penalty * violation). The textbook's step has
    lr = penalty, after the loss has been minimised; here there is one a training step, and lr is
    smaller.

    Args:
        lr, limit, dual_first: see `Dual`; `limit` bounds the multiplier alone.
        penalty: weight of the quadratic term, > 0.

    Raises:
        ValueError, TypeError: a number is out of its range.

    Source: Bertsekas, 1982, section 3.1 (inequalities).
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.number("penalty", self.penalty, "a number > 0", low=0.0, open_low=True)

    def term(self, multiplier: Tensor, violation: Tensor, *memory: Tensor) -> Tensor:
        felt = torch.relu(multiplier + self.penalty * violation)
        return (felt.square() - multiplier.square()).sum() / (2 * self.penalty)

    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor) -> None:
        multiplier.addcmul_(violation, lr).clamp_(0.0, self.limit)


@dataclass(frozen=True)
class EqualityAscent(Dual):
    """Density *equal* to the target, by a linear and a quadratic multiplier, both ascended.

    Equals:
        term = (multiplier * violation + quadratic * violation^2).sum()
        multiplier = multiplier + lr * violation            # of either sign
        quadratic = quadratic + lr * violation^2            # which only grows
    both within `limit`. A density below its target is pushed up again. (`prune` still takes the
    target as the most there may be.)

    Args:
        lr, limit, dual_first: see `Dual`.

    Raises:
        ValueError, TypeError: a number is out of its range.

    Source: Xia, Zhong, Chen, 2022 (CoFi); Xia, Gao, Zeng, Chen, 2023 (Sheared LLaMA).
    """

    memory: ClassVar[tuple[str, ...]] = ("quadratic",)

    def term(self, multiplier: Tensor, violation: Tensor, *memory: Tensor) -> Tensor:
        (quadratic,) = memory
        return torch.dot(multiplier + quadratic * violation, violation)

    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor) -> None:
        (quadratic,) = memory
        multiplier.addcmul_(violation, lr).clamp_(-self.limit, self.limit)
        quadratic.addcmul_(violation.square(), lr).clamp_(max=self.limit)


DUALS: dict[str, type[Dual]] = {
    "ascent": DualAscent,
    "pi": PIControl,
    "augmented": AugmentedLagrangian,
    "equality": EqualityAscent,
}
"""The rules by the names that settings and the command have for them."""
