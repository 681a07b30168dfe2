"""An early look at a training loop: whether it trains the constraint's model at all, and its gates
fast enough."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from l0fast import _warnings

STILL = 10
"""After so many steps in which no gate has changed there is a warning."""
LOOK = 0.1
"""Share of the steps after which the gates should have moved."""
LEAST_MOVE = 0.3
"""How far at least, in the mean, while their density lags; from open to closed is about 3."""
LAG = 0.1
"""A density that is further above the target in force lags."""


class Idle:
    """Whether the weights of a constraint's model stay as they are: then another model is trained,
    such as a copy."""

    def __init__(self) -> None:
        self._count = 0
        self._before: list[tuple[int, int]] = []

    def look(self, term: Any) -> str | None:
        """Called after each step of the optimizer: what to say, once, or None. It reads no values
        back."""
        self._count += 1
        if self._count not in (1, STILL):
            return None
        weights = [
            layer.weight for layer in term.handle.layers.values() if hasattr(layer, "weight")
        ]
        trainable = [one for one in weights if isinstance(one, Tensor) and one.requires_grad]
        now = [(id(one), one._version) for one in trainable]
        if self._count == 1:
            self._before = now
            return None
        # Weights that no optimizer has keep their gradients.
        if not trainable or now != self._before or any(one.grad is not None for one in trainable):
            return None
        return (
            f"no weight of its model has changed in {STILL} steps. If you train another model, "
            "such as a copy, make the constraint from that one, or copy both at once: "
            "copy.deepcopy((model, constraint))"
        )


class Watch:
    """What one constraint has seen of the steps of a training loop."""

    def __init__(self) -> None:
        self._count = 0
        self._before: list[Tensor] = []
        self._idle = Idle()

    @torch.no_grad()
    def look(self, term: Any) -> None:
        """Called after the optimizer's step, before the term's own: warns, once, where gates do not
        move, or too slowly. It reads values back at two steps of a training."""
        idle = not term.learns or term.settled or term.starting
        if idle or torch.compiler.is_compiling():
            return
        words = self._idle.look(term)
        self._count += 1
        at = math.ceil(LOOK * term.steps) if term.steps else STILL
        if self._count > max(at, STILL) or self._count not in (1, STILL, at):
            return
        gates = term.handle.parameters()
        if gates[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._count == 1:
            self._before = [gate.clone() for gate in gates]
            return
        pairs = zip(gates, self._before, strict=True)
        moved = max(float((now - before).abs().mean()) for now, before in pairs)
        if self._count >= max(at, STILL):
            self._before = []
        # Gates in no optimizer keep their gradients.
        left = any(gate.grad is not None or not gate.requires_grad for gate in gates)
        still = self._count == STILL and moved == 0 and left
        if still and (words is not None or max(term.lags()) > LAG):
            self._count = max(at, STILL)  # it is told once
            self._warn(
                words
                or f"no gate has changed in {STILL} steps: they do not require grad, or no "
                "optimizer has them. Give the optimizer l0fast.param_groups(model, lr, steps=...), "
                "or attach the constraint to it"
            )
        elif term.steps and self._count == at >= STILL and moved < LEAST_MOVE:
            self._pace(term, moved)

    def _pace(self, term: Any, moved: float) -> None:
        lag = max(term.lags())
        if lag > LAG:
            self._warn(
                f"after {self._count} of {term.steps} steps the density is {lag:.2g} above the "
                f"target in force, and log_alpha has moved by {moved:.2g} (a gate needs about 3 to "
                "close): the gates' learning rate is too low, or their optimizer is not Adam. Give "
                "Adam l0fast.param_groups(model, lr, steps=...), or attach the constraint"
            )

    def _warn(self, words: str) -> None:
        _warnings.warn(f"constraint: {words}")
