"""An early look at an explicit loop: whether its gates are trained at all, and fast enough."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

STILL = 10
"""After so many steps in which no gate has changed there is a warning."""
LOOK = 0.1
"""Share of the steps after which the gates should have moved."""
LEAST_MOVE = 0.3
"""How far at least, in the mean, while their density lags; from open to closed is about 3."""
LAG = 0.1
"""A density that is further above the target in force lags."""


class Watch:
    """What one constraint has seen of the steps of a training loop."""

    def __init__(self) -> None:
        self._count = self._still = 0
        self._versions: list[int] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def look(self, term: Any) -> None:
        """Called after the optimizer's step, before the term's own: warns, once each, where gates
        do not move, or too slowly."""
        if not term.learns or torch.compiler.is_compiling() or term.settled:
            return
        gates = term.handle.parameters()
        self._count += 1
        if self._count == 1:
            self._before = [gate.double().mean() for gate in gates] if term.steps else []
        if self._versions:
            unchanged = all(g._version == v for g, v in zip(gates, self._versions, strict=False))
            self._still = self._still + 1 if unchanged else 0
            if self._still == STILL:
                self._warn(
                    f"no gate has changed in {STILL} steps: they do not require grad, or no "
                    "optimizer has them. Give the optimizer l0fast.param_groups(model, lr, "
                    "steps=...), or attach the constraint to it"
                )
        if term.steps and self._count == math.ceil(LOOK * term.steps) > STILL:
            self._pace(term, gates)

    def after(self, term: Any) -> None:
        """Called after the term's own step, which changes gates, too."""
        self._versions = [gate._version for gate in term.handle.parameters()]

    def _pace(self, term: Any, gates: list[Tensor]) -> None:
        lag = max(term.lags())
        pairs = zip(gates, self._before, strict=True)
        moved = max(abs(float(gate.double().mean() - before)) for gate, before in pairs)
        if lag > LAG and moved < LEAST_MOVE and self._still < STILL:
            self._warn(
                f"after {self._count} of {term.steps} steps the density is {lag:.2g} above the "
                f"target in force, and the gates have moved by {moved:.2g} (from open to closed it "
                "is about 3): their learning rate is too low, or is not Adam's. Give Adam "
                "l0fast.param_groups(model, lr, steps=...), or attach the constraint"
            )

    def _warn(self, words: str) -> None:
        warnings.warn(f"constraint: {words}", stacklevel=5)
