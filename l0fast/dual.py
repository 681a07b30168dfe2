"""How the multipliers of the constraints move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from l0fast import _checks


@dataclass(frozen=True)
class DualAscent:
    """Projected gradient ascent on the multipliers, with dual restarts.

    Equals, for each constraint:
        multiplier = max(0, multiplier + lr * violation)
        multiplier = 0 where violation < 0              # a dual restart

    Args:
        lr: dual learning rate, >= 0.
        restarts: whether a multiplier is set to 0 as soon as its constraint is strictly
            satisfied.

    Raises:
        ValueError, TypeError: `lr` is not a number >= 0.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (dual restarts).
    """

    lr: float = 1e-3
    restarts: bool = True

    def __post_init__(self) -> None:
        _checks.number("lr", self.lr, "a number >= 0", low=0.0)

    @torch.no_grad()
    def step_(self, multiplier: Tensor, violation: Tensor, lr: Tensor, restarts: Tensor) -> None:
        """One ascent step on `multiplier` [C], in place.

        Args:
            multiplier: [C], >= 0; moved.
            violation: [C], density - target.
            lr: 0-d dual learning rate.
            restarts: [C] counts of dual restarts; a multiplier that is set from above 0 to 0
                adds one.
        """
        if self.restarts:
            satisfied = violation < 0
            restarts.addcmul_(satisfied, multiplier.sign())
            multiplier.masked_fill_(satisfied, 0.0)
        multiplier.addcmul_(violation, lr).clamp_(min=0.0)
