"""Adam on gates, and the gradient of a constraint with it: one launch where kernels run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from l0fast.autograd.apart import lie_apart
from l0fast.autograd.lagrangian import kernels_of
from l0fast.maths.hard_concrete import HardConcrete
from l0fast.maths.lagrangian import Falling

MOST_COPIED = 2**20
"""Gradients that lie apart are copied end to end where they are no more than this."""


class Pull(NamedTuple):
    """What the gradient of a Lagrangian term is made of (see `maths.lagrangian`)."""

    counts: Tensor
    weights: Tensor
    multiplier: Tensor
    target: Tensor
    falling: Falling | None


def _end_to_end(grads: Sequence[Tensor]) -> Tensor | None:
    """[N] gradients of tensors, as one; None where that would cost much."""
    start = place = grads[0].data_ptr()
    for grad in grads:
        if grad.data_ptr() != place or not grad.is_contiguous():
            break
        place += grad.numel() * grad.element_size()
    total = sum([grad.numel() for grad in grads])
    if place == start + total * grads[0].element_size():
        whole = grads[0].untyped_storage().nbytes() // grads[0].element_size()
        if grads[0].storage_offset() + total <= whole:
            return grads[0].as_strided((total,), (1,))
    return torch.cat([grad.flatten() for grad in grads]) if total <= MOST_COPIED else None


def runs_at_once(gates: Sequence[Tensor], grads: Sequence[Tensor | None]) -> bool:
    """Whether one launch moves these gates by these gradients."""
    if not lie_apart(gates):
        return False
    given = [grad for grad in grads if grad is not None]
    return not given or (len(given) == len(grads) and lie_apart(given))


def gate_adam_(
    gates: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    scale: Tensor | None,
    moments: Sequence[Mapping[str, Tensor]],
    numbers: tuple[float, float, float, float],
    distribution: HardConcrete,
    pull: Pull | None,
) -> tuple[Tensor | None] | None:
    """One step of Adam on gates, in place, where `runs_at_once`; called without autograd.

    Equals, with `grad + dterm / dlog_alpha` as the gradient: torch.optim.Adam's step.

    Args:
        gates: log_alpha of each layer.
        grads: of each; or None for all of them.
        scale: 0-d, by which they are too large; or None.
        moments: of each gate: exp_avg, exp_avg_sq and step.
        numbers: lr, two betas and eps.
        distribution: of all gates.
        pull: of a constraint on these layers, in this order; or None.

    Returns:
        (violation [C] before the step, or None,), or None where nothing was done.
    """
    found = [grad for grad in grads if grad is not None]
    grad = _end_to_end(found) if found else None
    pulled = [] if pull is None else [*pull[:4], *(pull.falling or ())[:2]]
    kernels = kernels_of(*pulled or gates, *[] if scale is None else [scale])
    if kernels is None or (found and grad is None) or not (found or pulled):
        return None
    if pull is not None and len(pull.target) > kernels.MOST_CONSTRAINTS:
        return None
    kept = [[one[name] for one in moments] for name in ("exp_avg", "exp_avg_sq", "step")]
    if not all(lie_apart(one) for one in kept):
        return None
    shift = kernels.constants(*distribution.numbers).open_shift
    violation = kernels.gate_adam_(gates, kept, grad, scale, numbers, shift, pull)
    torch.autograd.graph.increment_version([*gates, *[one for some in kept for one in some]])
    return (violation,)
