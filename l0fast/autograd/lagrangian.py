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
from l0fast.maths.lagrangian import Falling


def kernels_of(first: Tensor, *others: Tensor) -> Any:
    """The kernels, if they run on these tensors: of multipliers, or of as many numbers."""
    if not direct.is_possible() or not runs_on_triton("auto", first):
        return None
    if any(one.dtype != torch.float32 or not one.is_contiguous() for one in (first, *others)):
        return None
    return kernels_for(first)


def _kernels_of(multiplier: Tensor, *others: Tensor) -> Any:
    kernels = kernels_of(multiplier, *others)
    return kernels if kernels and len(multiplier) <= kernels.MOST_CONSTRAINTS else None


class _Lagrangian(torch.autograd.Function):
    """(counts [L], weights [C, L], multiplier [C], target [C]) -> (term 0-d, violation [C])."""

    @staticmethod
    def forward(
        ctx: Any,
        counts: Tensor,
        weights: Tensor,
        multiplier: Tensor,
        target: Tensor,
        falling: Falling | None,
    ) -> tuple[Tensor, Tensor]:
        kernels = kernels_for(counts)
        assert kernels is not None
        term, violation = kernels.lagrangian_forward(counts, weights, multiplier, target, falling)
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
            return None, None, None, None, None
        return kernels.lagrangian_backward(dterm, weights, multiplier), None, None, None, None


def lagrangian(
    counts: Tensor,
    weights: Tensor,
    multiplier: Tensor,
    target: Tensor,
    falling: Falling | None = None,
) -> tuple[Tensor, Tensor]:
    """(term 0-d, violation [C]), see `maths.lagrangian`; the term alone is differentiable, and by
    the counts alone."""
    given = counts, weights, multiplier, target, falling
    more = () if falling is None else falling[:2]
    if _kernels_of(multiplier, counts, weights, target, *more) is not None:
        return _Lagrangian.apply(*given)  # type: ignore[return-value]
    term, violation = maths.lagrangian(*given)
    return term, violation.detach()


def ascend_(
    multiplier: Tensor, violation: Tensor, restarts: Tensor, lr: Tensor, limit: float
) -> None:
    """One step of the multipliers, in place, see `maths.lagrangian`."""
    kernels = _kernels_of(multiplier, violation, restarts, lr)
    if kernels is None:
        maths.ascend_(multiplier, violation, restarts, lr, limit)
    else:
        kernels.ascend_(multiplier, violation, restarts, lr, limit)
        # Autograd then sees that a term formed before has lost what it was formed with.
        torch.autograd.graph.increment_version([multiplier, restarts])
