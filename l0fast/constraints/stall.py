"""Stalls: a multiplier grows, but its density comes no nearer to its target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

WINDOW = 0.2
"""Share of the training's epochs over which a density must come nearer."""
LEAST_WINDOW = 5
FALL = 0.05
"""Share of the way to the target that counts as nearer."""
SLACK = 0.01
"""Share of a target; a density within it is where it should be."""
WEAK = 0.5
"""A multiplier is weak where multiplier x target is below this. Closing all gates can save no more
than that product, but costs up to the loss of an untrained model (log(10) = 2.3 with ten
classes)."""


@dataclass(frozen=True)
class Stall:
    """One constraint whose density comes no nearer to its target."""

    name: str
    target: float
    since: int
    """The first epoch of the stall."""
    densities: tuple[float, float]
    """Then and now."""
    multipliers: tuple[float, float]
    """Then and now."""

    def message(self, dual_lr: float, gate_lr: float) -> str:
        """One line: what stalls, since when, and what to change."""
        low, high = self.multipliers
        if high * self.target < WEAK:
            cause = "the multiplier is still too small to close gates"
            remedy = f"a larger dual learning rate (it is {dual_lr:.3g})"
        else:
            cause = "the gates do not follow the multiplier"
            remedy = f"a larger gate learning rate (it is {gate_lr:.3g})"
        before, now = self.densities
        return (
            f"stalled: the density of {self.name} is {now:.4f}; it was {before:.4f} in epoch "
            f"{self.since} and has come no nearer to its target {self.target:g} since. Its "
            f"multiplier went from {low:.3g} to {high:.3g}: {cause}; "
            f"try {remedy}, more epochs or a higher target"
        )


def find_stalls(
    history: Sequence[Row], targets: Mapping[str, float], epochs: int
) -> dict[str, Stall]:
    """Name of each constraint that stalls in the last row -> its stall.

    Equals, over the last max(LEAST_WINDOW, WINDOW x epochs) epochs, all of:
        density > aim * (1 + SLACK) in each, where aim is the current target
        (density - target) at the end >= (1 - FALL) * (density - target) at the start
        the multiplier has grown

    Args:
        history: rows of metrics, one an epoch, with "density", "aim" and "lambda" by constraint.
        targets: by constraint, the final ones.
        epochs: of the whole training.
    """
    window = max(LEAST_WINDOW, math.ceil(WINDOW * epochs))
    rows = history[-window - 1 :]
    found: dict[str, Stall] = {}
    if len(rows) <= window:
        return found
    for name, target in targets.items():
        over = all(row["density"][name] > row["aim"][name] * (1 + SLACK) for row in rows)
        first, last = rows[0], rows[-1]
        grown = last["lambda"][name] > first["lambda"][name]
        left = last["density"][name] - target

        def nearer(row: Row, name: str = name, target: float = target, left: float = left) -> bool:
            return left < (1 - FALL) * (row["density"][name] - target)

        if over and grown and not nearer(first):
            since = len(history) - 1
            while since and not nearer(history[since - 1]):
                since -= 1
            then = history[since]
            found[name] = Stall(
                name,
                target,
                then["epoch"],
                (then["density"][name], last["density"][name]),
                (then["lambda"][name], last["lambda"][name]),
            )
    return found


def last_messages(history: Sequence[Row]) -> dict[str, str]:
    """Name of each constraint that has stalled in a training -> its last message."""
    messages: dict[str, str] = {}
    for row in history:
        messages |= row.get("stalls", {})
    return messages
