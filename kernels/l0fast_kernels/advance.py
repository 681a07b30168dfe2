"""The end of a step: all gates back into their limits, and the multipliers' ascent, by one launch.

Every layer's log_alpha lies in a tensor of its own; a program takes a piece of one layer's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch
from l0fast_kernels.hard_concrete import BLOCK, TILE, flat_or_table, piece_of_segment
from l0fast_kernels.lagrangian import ascend
from l0fast_kernels.launch import Launch

Limits = tuple[float, float, float, float]
"""Lower, middle, floor and top of a layer's log_alpha (see `advance_kernel`)."""
Ascent = tuple[Tensor, Tensor, Tensor, Tensor, float, Tensor | None]
"""Multiplier, violation and restarts [C], learning rate [], the highest multiplier, and a count of
steps [], or None."""


@triton.jit(do_not_specialize=["constraints", "most", "n"])
def advance_kernel(
    log_alpha_ptr,
    limit_ptr,
    offset_ptr,
    multiplier_ptr,
    violation_ptr,
    restarts_ptr,
    lr_ptr,
    taken_ptr,
    most,
    constraints,
    n,
    CONSTRAINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """log_alpha = lower where log_alpha <= middle, else min(max(log_alpha, floor), top)

    with each layer's limits (lower, middle, floor, top). The first program also moves the
    multipliers (see `ascend`), and counts the step: taken += 1.
    """
    layer = tl.program_id(1)
    segment_start, start, stop = piece_of_segment(offset_ptr, n, TILE)
    log_alpha_ptr = flat_or_table(log_alpha_ptr, segment_start, True)
    lower, middle = tl.load(limit_ptr + 4 * layer), tl.load(limit_ptr + 4 * layer + 1)
    floor, top = tl.load(limit_ptr + 4 * layer + 2), tl.load(limit_ptr + 4 * layer + 3)
    lane = tl.arange(0, BLOCK)
    first = start
    while first < stop:
        inside = lane < stop - first
        log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=0.0)
        held = tl.where(log_alpha < floor, floor, tl.where(log_alpha > top, top, log_alpha))
        held = tl.where(log_alpha <= middle, lower, held)  # and NaN stays NaN
        tl.store(log_alpha_ptr + first + lane, held, mask=inside)
        first += BLOCK
    if multiplier_ptr is not None:  # noqa: SIM102  # known when it is compiled
        if layer + tl.program_id(0) == 0:
            ascend(
                multiplier_ptr, violation_ptr, restarts_ptr, lr_ptr, most, constraints, CONSTRAINTS
            )
            if taken_ptr is not None:
                taken = tl.load(taken_ptr)
                tl.debug_barrier()
                tl.store(taken_ptr, taken + 1.0)


@functools.lru_cache(maxsize=256)
def _launch(sizes: tuple[int, ...], constraints: int) -> Launch:
    options: dict[str, Any] = {
        "CONSTRAINTS": triton.next_power_of_2(max(constraints, 1)),
        "BLOCK": BLOCK,
        "TILE": TILE,
    }
    grid = triton.cdiv(max(sizes), TILE), len(sizes)
    return Launch(advance_kernel, grid, (constraints, sum(sizes)), options)


@functools.cache
def _table(limits: tuple[Limits, ...], device: torch.device) -> Tensor:
    """float32 [L, 4], made once and kept, as a captured CUDA graph reads it."""
    return torch.tensor(limits, dtype=torch.float32, device=device)


def advance_(
    log_alphas: Sequence[Tensor], limits: tuple[Limits, ...], ascent: Ascent | None
) -> None:
    """Puts the gates of L layers within their limits, and moves the multipliers, in place.

    Args:
        log_alphas: each float32, contiguous and not empty.
        limits: of each.
        ascent: what the multipliers move by, float32; None for none.
    """
    sizes = tuple([one.numel() for one in log_alphas])
    device = log_alphas[0].device
    multiplier, violation, restarts, lr, most, taken = ascent or (None, None, None, None, 0.0, None)
    run = _launch(sizes, 0 if multiplier is None else len(multiplier))
    offsets = launch.offsets(sizes, device) if len(sizes) > 1 else None
    where = launch.table(log_alphas), _table(limits, device), offsets
    run(*where, multiplier, violation, restarts, lr, taken, numbers=(float(most),))
