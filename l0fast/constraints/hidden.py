"""Gradients of the gates, hidden from the optimizer of the weights while it takes its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Any]


class HiddenGradients:
    """The gradients that the gates have for one step of an optimizer.

    Args:
        gates: gives the log_alpha of every gated layer, in the same order each time.
    """

    def __init__(self, gates: Callable[[], list[Tensor]]) -> None:
        self._gates = gates
        self._held: list[Tensor | None] | None = None

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        """Pre-hook of the step: hides the gradients, those of a closure too."""
        by_position = len(args) > 1  # the optimizer itself is the first
        closure: Closure | None = args[1] if by_position else kwargs.get("closure")
        self._hide()
        if closure is None:
            return None
        evaluate = self._evaluated(optimizer, closure)
        if by_position:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _hide(self) -> None:
        gates = self._gates()
        found = [gate.grad for gate in gates]
        # A step within a step (of a subclass that calls its base's) finds none: nothing changes.
        if self._held is None or any(grad is not None for grad in found):
            self._held = found
        for gate in gates:
            gate.grad = None

    def _evaluated(self, optimizer: torch.optim.Optimizer, closure: Closure) -> Closure:
        """The closure of a step; the gates' gradients are those of its last evaluation.

        What was accumulated before the step stays in the first evaluation, unless the optimizer
        has called zero_grad since. All evaluations of a step draw the same gates, as a line search
        needs.
        """
        earlier = self._held or []
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        witness = next((p for p in weights if p.grad is not None), None)
        states: list[list[Tensor]] = []

        def evaluate() -> Any:
            device = self._gates()[0].device
            if states:
                _set_random_state(device, states[0])
            else:
                states.append(_random_state(device))
                if witness is not None and witness.grad is not None:
                    for gate, grad in zip(self._gates(), earlier, strict=False):
                        gate.grad = grad
            self._held = None
            loss = closure()
            self._hide()
            return loss

        return evaluate

    def take(self) -> list[Tensor | None] | None:
        """The gradients, once; None where this step has given them already."""
        held, self._held = self._held, None
        return held

    def give_back(self, *_hook_arguments: Any) -> None:
        """Post-hook of an optimizer that is not the one to move the gates: shows them again."""
        for gate, grad in zip(self._gates(), self.take() or [], strict=False):
            gate.grad = grad


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
