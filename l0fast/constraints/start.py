"""The start of a training: all gates open, then each by the magnitude of its unit.

Gates that are drawn from the first step are decided by chance: nothing is known of the units yet.
After a start without noise the weights tell more from less important ones. From then on the gates
are quiet (see `Drawn.stage`): all of their noise keeps the weights of small models from learning.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from l0fast import _checks
from l0fast.constraints.ranking import scores, shared_magnitudes
from l0fast.layers.handle import ModelGates
from l0fast.layers.part import PartGate
from l0fast.layers.stages import DRAWN, OPEN, QUIET
from l0fast.measures.groups import Asking

START = 0.15
"""The share of the steps in which all gates are open."""
CENTRE, REACH = 2.0, 4.0
"""log_alpha of the gates when the start is over: its middle, and how far ranks spread it."""


def start_steps(start: float, steps: int) -> int:
    """The steps of the start in a training of `steps`; refuses what is out of its range."""
    _checks.number("start", start, "a share in [0, 1)", low=0.0, high=1.0, open_high=True)
    return math.ceil(start * _checks.whole("steps", steps))


class Starting(Asking):
    """A term whose training may start with all gates open, without noise.

    Attributes:
        open_left: how many steps of the start are left.
    """

    handle: ModelGates
    learns: bool = True
    """Whether the gates are trained."""
    open_left: int = 0

    def begin_(self) -> None:
        """Starts what the term counts from the gates as they are now."""

    def open_(self, steps: int) -> None:
        """Opens all gates for so many steps; with 0 they are drawn from the next step on."""
        steps = steps if self.learns else 0
        for part in self._counted():
            part.open_left = steps
        if self.learns:
            self.handle.set_stage(OPEN if steps else DRAWN)
        self.begin_()

    def refuse_capture(self, what: str) -> bool:
        """Whether a CUDA graph is being captured; refuses one of a step with all gates open."""
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if captured and self.starting:
            raise RuntimeError(
                f"{type(self).__name__}: got {what} in a CUDA graph while all gates are open at "
                "the start; expected a capture after it, or start=0"
            )
        return captured

    def _counted(self) -> list[Any]:
        return list(self.parts())

    @property
    def starting(self) -> bool:
        """Whether all gates are open, because the start is not over."""
        left = any(part.open_left for part in self._counted())
        return left and self.handle.stage == OPEN

    def count_(self) -> bool:
        """Counts a step of the start, on the host; after the last one the gates are spread (see
        `spread_`). It returns whether they were.

        A captured step does not have it: call it after each replay, and capture anew where it
        returns True. Attached, it counts each step of the optimizer, and the gates settle in it.
        """
        if not self.starting:
            return False
        for part in self._counted():
            part.open_left = max(part.open_left - 1, 0)
        if self.starting:
            return False
        spread_(self)
        return True

    def end_start_(self) -> None:
        """Ends the start now, if it is not over."""
        if self.starting:
            for part in self._counted():
                part.open_left = 0
            spread_(self)


@torch.no_grad()
def spread_(term: Any) -> None:
    """Ends the start: gives each gate its log_alpha by rank, in place, and lets quiet noise in.

    Equals, over all layers:
        log_alpha = CENTRE + REACH * (2 * rank / (N - 1) - 1)
    with the rank, from 0 to N - 1, of each unit's score: the share of its layer's weights, by their
    squares, that it has of what is left when all smaller ones are gone (see `ranking.scores`). The
    targets come down from the density that follows. Gates on branches and experts start at CENTRE.
    """
    handle = term.handle
    found = {name: scores(one.square()) for name, one in shared_magnitudes(handle.layers).items()}
    if found:
        device = next(iter(found.values())).device  # a model may lie on several
        flat = torch.cat([one.flatten().to(device, torch.float64) for one in found.values()])
        spread = torch.linspace(-1.0, 1.0, flat.numel(), dtype=flat.dtype, device=flat.device)
        ranks = torch.empty_like(flat).index_copy_(0, flat.argsort(stable=True), spread)
        parts = ranks.split([one.numel() for one in found.values()])
        for name, part in zip(found, parts, strict=True):
            log_alpha = handle.layers[name].log_alpha
            log_alpha.copy_((CENTRE + REACH * part).view(log_alpha.shape))
    for gate in handle.layers.values():
        if isinstance(gate, PartGate):
            gate.log_alpha.fill_(CENTRE)
    handle.set_stage(QUIET)
    term.begin_()
