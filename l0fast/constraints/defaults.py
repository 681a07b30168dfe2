"""What serves every model here: how the target comes down, and how fast the multiplier moves."""

from __future__ import annotations

import math
from collections.abc import Callable

from l0fast import _checks
from l0fast.constraints.dual import Dual, DualAscent
from l0fast.constraints.schedule import TargetSchedule

WARMUP = 0.45
"""The share of a training over which the target comes down."""
SETTLE = 0.3
"""The share of a training at its end in which the gates are decided."""
DUAL_GAIN = 33.0
DUAL_LR_MOST = 0.1


def default_schedule(steps: int) -> TargetSchedule:
    """A cubic over WARMUP of so many steps."""
    return TargetSchedule(math.ceil(WARMUP * steps))


def default_dual_lr(target: float, steps: int | None = None) -> float:
    """The dual learning rate for a density of `target`.

    With a target that comes down it is 1 / target, however long the training. The multiplier is
    then driven by what the density lags behind the target in force, and that is over in the about
    1 / gate_lr steps that gates take to follow: a lag of a tenth of the target raises it by some 3
    to 10 there. Restarts take away what is too much.

    With one that is in force for all of `steps` it is DUAL_GAIN / (target x steps), at most
    DUAL_LR_MOST. The multiplier has to reach the loss's sensitivity to density (it peaked at 1.0
    for the MLP and 2.2 for LeNet on MNIST, at 6 on digits), and the violation that drives it
    shrinks with the target. At 33 % the target was first met after 9 % (MNIST) and 19 % (digits) of
    the training. The upper bound keeps a short training from closing gates before the weights have
    learned anything.
    """
    if steps is None:
        return 1 / target
    return min(DUAL_GAIN / (target * steps), DUAL_LR_MOST)


def default_dual(least: float) -> Dual:
    """The rule for a target that comes down, of which `least` is the least."""
    return DualAscent(default_dual_lr(least))


def rules(
    steps: int | None,
    schedule: TargetSchedule | None,
    dual: Dual | Callable[[float], Dual] | None,
) -> tuple[TargetSchedule | None, Dual | Callable[[float], Dual] | None]:
    """What a caller named; with `steps`, the defaults for what was not. Refuses what is none."""
    if steps is not None:
        schedule = default_schedule(steps) if schedule is None else schedule
        dual = default_dual if dual is None else dual
    if not (schedule is None or isinstance(schedule, TargetSchedule)):
        _checks.refuse("schedule", schedule, "a TargetSchedule or None", TypeError)
    known = dual is None or isinstance(dual, Dual)
    if isinstance(dual, type) or not (known or callable(dual)):
        expected = "a Dual, such as DualAscent(), a function that returns one, or None"
        _checks.refuse("dual", dual, expected, TypeError)
    return schedule, dual


def dual_for(dual: Dual | Callable[[float], Dual] | None, least: float) -> Dual:
    """The rule that a caller named, for targets of which `least` is the least."""
    if dual is None or isinstance(dual, Dual):
        return dual or DualAscent()
    made = dual(least)
    if not isinstance(made, Dual):
        _checks.refuse("dual", made, "a function that returns a Dual", TypeError)
    return made
