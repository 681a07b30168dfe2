"""The Lagrangian term and the ascent of its multipliers: one launch each where kernels run.

A compiler is given the reference, which it fuses itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l0fast.autograd import direct
from l0fast.autograd.backend import kernels_for, runs_on_triton
from l0fast.maths import lagrangian as maths


def _kernels(multiplier: Tensor, *others: Tensor) -> Any:
    """The kernels, if they run on these tensors."""
    if not direct.is_possible() or not runs_on_triton("auto", multiplier):
        return None
    if any(one.dtype != torch.float32 or not one.is_contiguous() for one in (multiplier, *others)):
        return None
    kernels = kernels_for(multiplier)
    assert kernels is not None
    return kernels if len(multiplier) <= kernels.MOST_CONSTRAINTS else None


class _Lagrangian(torch.autograd.Function):
    """(counts [L], weights [C, L], multiplier [C], target [C]) -> (term 0-d, violation [C])."""

    @staticmethod
    def forward(
        ctx: Any, counts: Tensor, weights: Tensor, multiplier: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernels = kernels_for(counts)
        assert kernels is not None
        term, violation = kernels.lagrangian_forward(counts, weights, multiplier, target)
        ctx.save_for_backward(weights, multiplier)
        ctx.mark_non_differentiable(violation)
        ctx.set_materialize_grads(False)
        return term, violation

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dterm: Tensor | None, _: Any) -> Any:
        weights, multiplier = ctx.saved_tensors
        kernels = kernels_for(weights)
        assert kernels is not None
        if dterm is None:
            return None, None, None, None
        return kernels.lagrangian_backward(dterm, weights, multiplier), None, None, None


def lagrangian(
    counts: Tensor, weights: Tensor, multiplier: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """(term 0-d, violation [C]), see `maths.lagrangian`; the term alone is differentiable, and by
    the counts alone."""
    if _kernels(multiplier, counts, weights, target) is not None:
        return _Lagrangian.apply(counts, weights, multiplier, target)  # type: ignore[return-value]
    term, violation = maths.lagrangian(counts, weights, multiplier, target)
    return term, violation.detach()


def ascend_(
    multiplier: Tensor, violation: Tensor, restarts: Tensor, lr: Tensor, limit: float
) -> None:
    """One step of the multipliers, in place, see `maths.lagrangian`."""
    kernels = _kernels(multiplier, violation, restarts, lr)
    if kernels is None:
        maths.ascend_(multiplier, violation, restarts, lr, limit)
    else:
        kernels.ascend_(multiplier, violation, restarts, lr, limit)
        # Autograd then sees that a term formed before has lost what it was formed with.
        torch.autograd.graph.increment_version([multiplier, restarts])
