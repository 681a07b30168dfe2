"""Gates of many layers whose log_alpha lie apart: one launch, and nothing is copied end to end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from l0fast.autograd import direct
from l0fast.autograd.backend import runs_on_triton
from l0fast.maths.hard_concrete import HardConcrete


def lie_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether one launch can read these tensors where they lie."""
    if not (direct.is_possible() and runs_on_triton("auto", tensors[0])):
        return False
    device = tensors[0].device
    return all(
        type(one) in (Tensor, nn.Parameter)
        and (one.dtype, one.device) == (torch.float32, device)
        and one.is_contiguous()
        for one in tensors
    )


def _constants(distribution: HardConcrete) -> tuple[Any, Any]:
    import l0fast_kernels as kernels

    return kernels, kernels.constants(*distribution.numbers)


class _DrawApart(torch.autograd.Function):
    """(log_alphas, [N] in all) -> (z [N], expected_open [L], or None without noise)."""

    @staticmethod
    def forward(
        ctx: Any, state: Tensor | None, distribution: HardConcrete, *log_alphas: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        kernels, constants = _constants(distribution)
        ctx.sizes = tuple([one.numel() for one in log_alphas])
        ctx.distribution, ctx.spent = distribution, False
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(state, *log_alphas)
        return kernels.hard_concrete_forward(log_alphas, state, ctx.sizes, constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dopen: Tensor | None) -> Any:
        ctx.spent = True  # as in `functions`
        state, *log_alphas = ctx.saved_tensors
        if dz is None and dopen is None:
            return None, None, *[None] * len(log_alphas)
        kernels, constants = _constants(ctx.distribution)
        given = dz, dopen, log_alphas, state, ctx.sizes, constants
        dlog_alpha = kernels.hard_concrete_backward(*given)
        parts = dlog_alpha.split(ctx.sizes)
        shaped = [part.view(one.shape) for part, one in zip(parts, log_alphas, strict=True)]
        return None, None, *shaped


def draw_apart(
    log_alphas: Sequence[Tensor], state: Tensor | None, distribution: HardConcrete
) -> tuple[Tensor, Tensor | None]:
    """(z [N], expected_open [L]) of the tensors' gates, end to end; where they `lie_apart`.

    `state` names the noise (see `ops`). With None the gates are those of evaluation, and nothing
    is counted.
    """
    return _DrawApart.apply(state, distribution, *log_alphas)  # type: ignore[return-value]
