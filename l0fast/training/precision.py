"""The precision of a run: autocast around the forward, and a scaled loss for fp16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""The dtype of matrix products and convolutions; weights stay in float32."""


class Precision:
    """The precision of a step, from the forward to the optimizer.

    Args:
        name: one of DTYPES.
        device: of the run.

    Attributes:
        scaler: scales the loss, with fp16, so that small gradients are not rounded to 0. If the
            scaled gradients overflow, the step does not change weights and gates.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype, self._device = DTYPES[name], device
        fp16 = self._dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None  # type: ignore[attr-defined]

    def forward(self) -> AbstractContextManager[object]:
        """Within it, a forward runs in this precision."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def backward(self, objective: Tensor) -> None:
        """Computes the gradients of `objective` (0-d); with fp16 they are scaled."""
        (objective if self.scaler is None else self.scaler.scale(objective)).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
        """One step of the optimizer, with the norm of the weights' gradient at most `clip`.

        The gates are not clipped, as their gradient contains that of the constraint.
        """
        if clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        if self.scaler is None:
            optimizer.step()
            return
        self.scaler.step(optimizer)
        self.scaler.update()


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Number of steps that Adam has taken; those that a scaler skipped do not count."""
    taken = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return int(max(taken, default=0))
