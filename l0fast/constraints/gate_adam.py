"""The Adam that moves the gates of an attached training, whatever optimizer the weights have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from l0fast.autograd import Pull, gate_adam_
from l0fast.maths.hard_concrete import HardConcrete


class GateAdam:
    """Adam on the gates of a model; gates that are replaced keep their moments.

    Args:
        gates: the log_alpha of every gated layer, each once.
        lr: learning rate.
    """

    def __init__(self, gates: list[Tensor], lr: float) -> None:
        device = gates[0].device.type
        self.adam = torch.optim.Adam(
            gates,
            lr=lr,
            fused=device in ("cpu", "cuda") and all(gate.is_floating_point() for gate in gates),
            capturable=device == "cuda",
        )

    def step(self, gates: list[Tensor], grads: Sequence[Tensor | None]) -> None:
        """One step by these gradients."""
        self._bind(gates)
        for gate, grad in zip(gates, grads, strict=True):
            gate.grad = grad
        self.adam.step()
        for gate in gates:
            gate.grad = None

    def step_at_once(
        self,
        gates: list[Tensor],
        grads: Sequence[Tensor | None],
        scale: Tensor | None,
        distribution: HardConcrete,
        pull: Pull | None,
    ) -> tuple[Tensor | None] | None:
        """The same by one launch, with the gradient of a constraint (see `autograd.gate_adam`)."""
        self._bind(gates)
        group = self.adam.param_groups[0]
        if isinstance(group["lr"], Tensor):
            return None
        numbers = group["lr"], *group["betas"], group["eps"]
        moments = [self._moments(gate) for gate in gates]
        return gate_adam_(gates, grads, scale, moments, numbers, distribution, pull)

    def _bind(self, gates: list[Tensor]) -> None:
        """Moves the moments to the parameters that stand for the gates now."""
        group = self.adam.param_groups[0]
        before: list[Tensor] = group["params"]
        if all(old is new for old, new in zip(before, gates, strict=True)):
            return
        state = self.adam.state
        moments = [state.pop(old, None) for old in before]
        for new, kept in zip(gates, moments, strict=True):
            if kept:
                state[new] = {key: value.to(new.device) for key, value in kept.items()}
        group["params"] = gates

    def _moments(self, gate: Tensor) -> dict[str, Tensor]:
        """Of one gate; before its first step they are zeros."""
        if not self.adam.state.get(gate):
            group = self.adam.param_groups[0]
            on_device = group["capturable"] or group["fused"]
            self.adam.state[gate] = {
                "step": torch.zeros(
                    (), dtype=torch.float32, device=gate.device if on_device else "cpu"
                ),
                "exp_avg": torch.zeros_like(gate, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(gate, requires_grad=False),
            }
        return self.adam.state[gate]

    def state_dict(self, gates: list[Tensor]) -> dict[str, dict[str, Tensor]]:
        """The moments of each gate, by its place; those of gates that have not moved, too, as a
        distributed checkpoint loads only into what is there."""
        self._bind(gates)
        return {str(place): dict(self._moments(gate)) for place, gate in enumerate(gates)}

    def load_state_dict(self, gates: list[Tensor], state: Mapping[str, Any]) -> None:
        """Takes the moments over."""
        self._bind(gates)
        mine = self.adam.state_dict()
        by_place = {int(place): moments for place, moments in state.items()}
        self.adam.load_state_dict({**mine, "state": by_place})

    def show_in(self, optimizer: torch.optim.Optimizer, gates: list[Tensor]) -> None:
        """Shows the moments in the state of the optimizer that has the gates, too, once it has one
        of its own: `torch.distributed.checkpoint` asks for a state of every parameter."""
        own = set(map(id, gates))
        if any(id(parameter) not in own for parameter in optimizer.state):
            for gate in gates:
                optimizer.state[gate] = self._moments(gate)
