"""Stalls, in words: a multiplier that grows while its density comes no nearer to its target."""

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
"""A multiplier times its target below that is a weak one: the largest that closing all gates could
save, beside the loss of a model that knows nothing (log(10) = 2.3 with ten classes)."""


@dataclass(frozen=True)
class Stall:
    """One constraint over the epochs in which nothing happened to its density."""

    name: str
    target: float
    since: int
    """The epoch from which on it has come no nearer."""
    densities: tuple[float, float]
    """Then and now."""
    multipliers: tuple[float, float]

    def words(self, dual_lr: float, gate_lr: float) -> str:
        """One line: what, since when, and what to change."""
        low, high = self.multipliers
        if high * self.target < WEAK:
            cause = "the multiplier is still too small to close gates"
            first = f"a larger dual learning rate (it is {dual_lr:.3g})"
        else:
            cause = "the gates do not follow it"
            first = f"a larger gate learning rate (it is {gate_lr:.3g})"
        return (
            f"stalled: {self.name} is at density {self.densities[1]:.4f}, {self.densities[0]:.4f} "
            f"in epoch {self.since}, and has come no nearer to its target {self.target:g} since, "
            f"while its multiplier went from {low:.3g} to {high:.3g}: {cause}; "
            f"try {first}, more epochs or a higher target"
        )


def find_stalls(
    history: Sequence[Row], targets: Mapping[str, float], epochs: int
) -> dict[str, Stall]:
    """The constraints that are stalled as of the last row, by name.

    Equals, over the last max(LEAST_WINDOW, WINDOW x epochs) epochs, all of:
        density > aim * (1 + SLACK) in each, where aim is the target in force
        (density - target) at the end >= (1 - FALL) * (density - target) at the start
        the multiplier has grown

    Args:
        history: rows of metrics, one an epoch, with "density", "aim" and "lambda" by constraint.
        targets: what is asked in the end.
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


def told(history: Sequence[Row]) -> dict[str, str]:
    """What a whole training had to say of stalls: the last words on each constraint."""
    words: dict[str, str] = {}
    for row in history:
        words |= row.get("stalls", {})
    return words
