"""How a target comes down: from the density that a model starts at to the one asked for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from l0fast import _checks
from l0fast.maths.lagrangian import Falling

POWERS = {"linear": 1, "cubic": 3}


@dataclass(frozen=True)
class TargetSchedule:
    """A target that comes down over the first steps of a training, and then stays.

    Equals, after t steps:
        target + (start - target) * (1 - min(t / steps, 1)) ** power
    with power 1 for "linear" and 3 for "cubic". `prune` holds the final target at any time.

    Args:
        steps: number of the constraint's steps until the target is reached, >= 1.
        shape: "cubic" (fast at first) or "linear".
        start: the density to begin at, in (0, 1]. None: the density that each constraint has when
            its target begins to come down. A start below the target counts as the target.

    Raises:
        ValueError, TypeError: a value is out of its range.

    Source: Zhu and Gupta, 2017, eq. 1 (cubic).
    """

    steps: int
    shape: str = "cubic"
    start: float | None = None

    def __post_init__(self) -> None:
        _checks.whole("steps", self.steps)
        _checks.one_of("shape", self.shape, tuple(POWERS))
        if self.start is not None:
            _checks.density("start", self.start)

    def falling(self, taken: Tensor, start: Tensor) -> Falling:
        """How targets [C] come down from `start` [C] after `taken` (0-d) steps."""
        return Falling(start, taken, self.steps, POWERS[self.shape])

    def at(self, taken: Tensor, start: Tensor, target: Tensor) -> Tensor:
        """[C] targets in force after `taken` (0-d) steps; no host sync."""
        return self.falling(taken, start).to(target)
