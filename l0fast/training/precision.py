"""The precision of a run: autocast around the forward, and for fp16 a scaled loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

DTYPES: dict[str, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What matrix products and convolutions are computed in; weights stay in float32."""


class Precision:
    """How one step computes, from the forward to the optimizer.

    Args:
        name: one of DTYPES.
        device: of the run.

    Attributes:
        scaler: of the loss, with fp16: gradients below what the type can hold would be lost. A step
            whose scaled gradients overflow leaves weights and gates as they are.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self._dtype, self._device = DTYPES[name], device
        fp16 = self._dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type) if fp16 else None  # type: ignore[attr-defined]

    def forward(self) -> AbstractContextManager[object]:
        """Within it, a forward has this precision."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def backward(self, objective: Tensor) -> None:
        """The gradients of `objective`, 0-d; those of fp16 are scaled."""
        (objective if self.scaler is None else self.scaler.scale(objective)).backward()

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None) -> None:
        """One step of the optimizer, with the norm of the weights' gradient at most `clip`.

        The gates are not clipped: their gradient has the constraint's part in it.
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
    """How many steps Adam has taken; one that a scaler has skipped is none."""
    taken = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return int(max(taken, default=0))
