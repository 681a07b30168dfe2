"""The gates of all layers: one launch forward, one backward.

Gates are tiny and many: all layers' log_alpha lie end to end in one tensor [N], cut into L
segments. A program takes a piece of one segment, so that a segment's expected L0 is one sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import device_math, launch
from l0fast_kernels.launch import ALIGNMENT, WARPS, Constants

BLOCK = 1024
# Gates per program: whole layers of ordinary models, so that there is no second stage.
TILE = 16 * BLOCK


class OpenGates(NamedTuple):
    """Which gates of each segment are open.

    ``order`` [N] permutes each segment: first its open gates, ascending, then its closed ones,
    descending. So a consumer may round a count up to its block: the indices it reads beyond are
    valid, all different, and belong to gates that are zero. ``count`` [L] counts the open ones.
    """

    order: Tensor
    count: Tensor


@triton.jit(do_not_specialize=["n"])
def hard_concrete_kernel(
    log_alpha_ptr,
    offset_ptr,
    state_ptr,
    z_ptr,
    open_ptr,
    order_ptr,
    count_ptr,
    n,
    inverse_temperature,
    alpha_scale,
    gamma,
    width,
    open_shift,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)
    z = clamp(s * (zeta - gamma) + gamma, 0, 1)
    expected_open = sum of sigmoid(log_alpha - temperature * log(-gamma / zeta))

    with u from Philox, keyed by the state's (seed, step, tensor); expected_open of the piece.
    """
    segment = tl.program_id(1)
    piece = tl.program_id(0)
    if offset_ptr is not None:
        segment_start = tl.load(offset_ptr + segment)
        segment_stop = tl.load(offset_ptr + segment + 1)
    else:
        segment_start = n * 0
        segment_stop = n
    start = segment_start + piece.to(tl.int64) * TILE
    stop = tl.minimum(segment_stop, start + TILE)
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)

    lane = tl.arange(0, BLOCK)
    expected = tl.zeros([BLOCK], dtype=tl.float32)
    n_open = start * 0
    n_closed = start * 0
    first = start // BLOCK * BLOCK
    while first < stop:
        before = tl.multiple_of(start - first, ALIGNMENT)
        beyond = tl.multiple_of(stop - first, ALIGNMENT)
        inside = (lane >= before) & (lane < beyond)
        log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=float("-inf"))
        bits = device_math.random_words(first, seed, step, tensor, BLOCK, 4)
        u = device_math.uniform(bits, FAST)
        s = device_math.concrete(log_alpha, u, inverse_temperature, alpha_scale, FAST)
        z = device_math.stretch(s, gamma, width)
        # Lanes outside have log_alpha = -inf: their open probability is 0.
        expected += device_math.open_probability(log_alpha, open_shift)
        tl.store(z_ptr + first + lane, z, mask=inside)
        if order_ptr is not None:
            opens = (inside & (z > 0.0)).to(tl.int64)
            closes = inside.to(tl.int64) - opens
            from_front = segment_start + n_open + tl.cumsum(opens, 0) - 1
            from_back = segment_stop - n_closed - tl.cumsum(closes, 0)
            place = tl.where(opens > 0, from_front, from_back)
            tl.store(order_ptr + place, first + lane - segment_start, mask=inside)
            n_open += tl.sum(opens, 0)
            n_closed += tl.sum(closes, 0)
        first += BLOCK
    tl.store(open_ptr + segment * tl.num_programs(0) + piece, tl.sum(expected, 0))
    if order_ptr is not None:
        tl.store(count_ptr + segment, n_open)


@triton.jit(do_not_specialize=["n"])
def hard_concrete_backward_kernel(
    dz_ptr,
    dopen_ptr,
    log_alpha_ptr,
    offset_ptr,
    state_ptr,
    dlog_alpha_ptr,
    n,
    inverse_temperature,
    alpha_scale,
    gamma,
    width,
    open_shift,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """dlog_alpha = dz * [0 < z < 1] * (zeta - gamma) / temperature * s * (1 - s)
               + dopen * p * (1 - p)

    with s, z and u as in the forward (the noise is drawn again), p the open probability, and
    dopen the gradient of the segment's expected_open.
    """
    segment = tl.program_id(1)
    piece = tl.program_id(0)
    if offset_ptr is not None:
        segment_start = tl.load(offset_ptr + segment)
        segment_stop = tl.load(offset_ptr + segment + 1)
    else:
        segment_start = n * 0
        segment_stop = n
    start = segment_start + piece.to(tl.int64) * TILE
    stop = tl.minimum(segment_stop, start + TILE)
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)

    lane = tl.arange(0, BLOCK)
    first = start // BLOCK * BLOCK
    while first < stop:
        before = tl.multiple_of(start - first, ALIGNMENT)
        beyond = tl.multiple_of(stop - first, ALIGNMENT)
        inside = (lane >= before) & (lane < beyond)
        log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=0.0)
        dlog_alpha = tl.zeros([BLOCK], dtype=tl.float32)
        if dz_ptr is not None:
            dz = tl.load(dz_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
            bits = device_math.random_words(first, seed, step, tensor, BLOCK, 4)
            u = device_math.uniform(bits, FAST)
            s = device_math.concrete(log_alpha, u, inverse_temperature, alpha_scale, FAST)
            z = device_math.stretch(s, gamma, width)
            dlog_alpha += device_math.stretch_backward(dz, s, z, width * inverse_temperature)
        if dopen_ptr is not None:
            p = device_math.open_probability(log_alpha, open_shift)
            dopen = tl.load(dopen_ptr + segment)
            dlog_alpha += device_math.open_probability_backward(dopen, p)
        tl.store(dlog_alpha_ptr + first + lane, dlog_alpha, mask=inside)
        first += BLOCK


def _alignment(sizes: tuple[int, ...]) -> int:
    return ALIGNMENT if all(size % ALIGNMENT == 0 for size in sizes) else 1


def hard_concrete_forward(
    log_alpha: Tensor, state: Tensor, sizes: tuple[int, ...], c: Constants, *, order: bool = False
) -> tuple[Tensor, Tensor, OpenGates | None]:
    """Sample N gates and sum their open probabilities over L segments.

    Args:
        log_alpha: float32 [N].
        state: int64 [3] on the same device: seed, step, tensor.
        sizes: the L segments' lengths, with sum N.
        c: the distribution.
        order: also say which gates are open, in order, without leaving the device.

    Returns:
        z float32 [N], expected_open float32 [L], and OpenGates or None.
    """
    log_alpha = log_alpha.contiguous()
    n, segments = log_alpha.numel(), len(sizes)
    # An order is a running count, which one program keeps for a whole segment.
    tile = triton.next_power_of_2(max([TILE, *sizes])) if order else TILE
    pieces = max(1, triton.cdiv(max(sizes, default=0), tile))
    z = launch.empty(log_alpha, (n,))
    partial = launch.empty(log_alpha, (segments, pieces))
    opened = None
    if order:
        opened = OpenGates(
            order=launch.empty(log_alpha, (n,), torch.int64),
            count=launch.empty(log_alpha, (segments,), torch.int64),
        )
    if segments:
        with launch.on(log_alpha):
            hard_concrete_kernel[(pieces, segments)](
                log_alpha,
                launch.offsets(sizes, log_alpha.device) if segments > 1 else None,
                state,
                z,
                partial,
                None if opened is None else opened.order,
                None if opened is None else opened.count,
                n,
                *c,
                BLOCK=BLOCK,
                TILE=tile,
                ALIGNMENT=_alignment(sizes),
                FAST=launch.fast(),
                num_warps=WARPS,
            )
    expected_open = partial.view(segments) if pieces == 1 else partial.sum(1)
    return z, expected_open, opened


def hard_concrete_backward(
    dz: Tensor | None,
    dopen: Tensor | None,
    log_alpha: Tensor,
    state: Tensor,
    sizes: tuple[int, ...],
    c: Constants,
) -> Tensor:
    """dlog_alpha float32 [N], of z's gradient dz [N] and expected_open's gradient dopen [L].

    A gradient that is None counts as zero. The rest as in the forward.
    """
    log_alpha = log_alpha.contiguous()
    n, segments = log_alpha.numel(), len(sizes)
    dlog_alpha = launch.empty(log_alpha, (n,))
    if n:
        with launch.on(log_alpha):
            hard_concrete_backward_kernel[(triton.cdiv(max(sizes), TILE), segments)](
                None if dz is None else dz.contiguous(),
                None if dopen is None else dopen.contiguous(),
                log_alpha,
                launch.offsets(sizes, log_alpha.device) if segments > 1 else None,
                state,
                dlog_alpha,
                n,
                *c,
                BLOCK=BLOCK,
                TILE=TILE,
                ALIGNMENT=_alignment(sizes),
                FAST=launch.fast(),
                num_warps=WARPS,
            )
    return dlog_alpha
