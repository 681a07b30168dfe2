"""Duals: how the multipliers of the constraints move. One interface, four rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.autograd import ascend_
from l0fast.maths.advance import Ascent


@dataclass(frozen=True)
class Dual:
    """The base of all rules: a term of the loss, and a step for the multipliers.

    Derive your own rule from this class. A rule holds numbers only. The multipliers, and the
    tensors that `memory` names, are buffers of the constraint: they are moved and saved with it.

    Args:
        lr: dual learning rate, >= 0.
        limit: the highest multiplier, > 0; no limit by default. A multiplier grows until the gates
            follow it. If no restart sets it to 0 then, it goes on closing gates after the target
            is met. A first value to try: (loss of an untrained model) / target. Above that, even a
            perfect model within its target has a higher Lagrangian than a model with all gates
            closed. But a multiplier may need more for a while, since gates that are far open have
            small gradients: more than ten times that value has been seen.
        dual_first: whether the multipliers move before each step's loss is formed, by the
            violation of that step, rather than in `step()` (alternating updates). This needs no
            second forward, since the expected densities depend on the gates' parameters alone.

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

    @property
    def is_plain(self) -> bool:
        """Whether its term is this one, so that one op computes it and the densities."""
        return type(self).term is Dual.term and not self.dual_first

    def term(self, multiplier: Tensor, violation: Tensor, *memory: Tensor) -> Tensor:
        """0-d: what is added to the loss; `violation` [C] is density - target, differentiable."""
        return torch.dot(multiplier, violation)

    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor) -> None:
        """Moves `multiplier` [C] and the memory in place, by `lr` (0-d).

        It is called without autograd, and must not wait for the device."""
        raise NotImplementedError

    def ascent(
        self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor
    ) -> Ascent | None:
        """The same step, if it is an ascent with restarts, which one launch takes with others."""
        return None


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
        """One step of ascent; `memory` counts the restarts that set a multiplier > 0 to 0."""
        if not self.restarts:
            multiplier.addcmul_(violation, lr).clamp_(0.0, self.limit)
            return
        (restarts,) = memory
        ascend_(multiplier, violation, restarts, lr, self.limit)

    def ascent(
        self, multiplier: Tensor, violation: Tensor, lr: Tensor, *memory: Tensor
    ) -> Ascent | None:
        if not self.restarts or self.dual_first or type(self).step_ is not DualAscent.step_:
            return None
        (restarts,) = memory
        return Ascent(multiplier, violation, restarts, lr, self.limit, None)


@dataclass(frozen=True)
class PIControl(Dual):
    """Proportional-integral control of the multipliers (nuPI).

    Equals, for each constraint, from smoothed = 0:
        before, smoothed = smoothed, smoothing * smoothed + (1 - smoothing) * violation
        multiplier = multiplier + lr * violation + proportional * (smoothed - before)
        multiplier = min(max(0, multiplier), limit)
    The proportional part lowers the multiplier as soon as the violation falls, earlier than the
    integral part does. So there is less overshoot. With proportional = 0 it is `DualAscent`
    without restarts.

    Args:
        lr, limit, dual_first: see `Dual`; lr is the integral gain, kappa_i.
        proportional: the proportional gain, kappa_p, >= 0: multiplier per violation.
        smoothing: nu, the decay of the moving average of the violation, in [0, 1).

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
    """The augmented Lagrangian: the loss also has a quadratic term of the violation.

    Equals:
        term = (max(0, multiplier + penalty * violation)^2 - multiplier^2).sum() / (2 * penalty)
        multiplier = min(max(0, multiplier + lr * violation), limit)
    So the weight of the density in the loss is max(0, multiplier + penalty * violation). In the
    textbook the multiplier moves once the loss is minimised, with lr = penalty. Here it moves in
    each training step, with a smaller lr.

    Args:
        lr, limit, dual_first: see `Dual`; `limit` does not bound the quadratic term.
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
    """Makes the density *equal* to the target, by a linear and a quadratic multiplier.

    Equals:
        term = (multiplier * violation + quadratic * violation^2).sum()
        multiplier = multiplier + lr * violation            # of either sign
        quadratic = quadratic + lr * violation^2            # which only grows
    Both stay within `limit`. A density below its target is pushed up again. `prune` still takes
    the target as an upper bound.

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
"""The rules by their names in the settings and in the command."""


def state_in_words(state: Mapping[str, Any]) -> str:
    """What the extra state of a constraint says it is of."""
    groups = ", ".join(f"{name} ({' '.join(layers)})" for name, layers in state["groups"])
    # States of before there was another dual do not name theirs.
    dual = state.get("dual", DualAscent.__name__)
    scheduled = " with a schedule" if state.get("scheduled") else ""
    return f"constraints on {groups} by {state['measure']}, moved by {dual}{scheduled}"
