"""The gates of all layers: one launch forward, one backward.

Gates are tiny and many: all layers' log_alpha lie end to end in one tensor [N], cut into L
segments. A program takes a piece of one segment, so that a segment's expected L0 is one sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import device_math, launch
from l0fast_kernels.launch import ALIGNMENT, WARPS, Constants

BLOCK = 1024
# Gates per program: whole layers of ordinary models, so that there is no second stage.
TILE = 16 * BLOCK


@triton.jit(do_not_specialize=["n"])
def hard_concrete_kernel(
    log_alpha_ptr,
    offset_ptr,
    state_ptr,
    z_ptr,
    open_ptr,
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
        first += BLOCK
    tl.store(open_ptr + segment * tl.num_programs(0) + piece, tl.sum(expected, 0))


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
    log_alpha: Tensor, state: Tensor, sizes: tuple[int, ...], c: Constants
) -> tuple[Tensor, Tensor]:
    """Sample N gates and sum their open probabilities over L segments.

    Args:
        log_alpha: float32 [N].
        state: int64 [3] on the same device: seed, step, tensor.
        sizes: the L segments' lengths, with sum N.
        c: the distribution.

    Returns:
        z float32 [N] and expected_open float32 [L].
    """
    log_alpha = log_alpha.contiguous()
    n, segments = log_alpha.numel(), len(sizes)
    pieces = max(1, triton.cdiv(max(sizes, default=0), TILE))
    z = launch.empty(log_alpha, (n,))
    partial = launch.empty(log_alpha, (segments, pieces))
    if segments:
        with launch.on(log_alpha):
            hard_concrete_kernel[(pieces, segments)](
                log_alpha,
                launch.offsets(sizes, log_alpha.device) if segments > 1 else None,
                state,
                z,
                partial,
                n,
                *c,
                BLOCK=BLOCK,
                TILE=TILE,
                ALIGNMENT=_alignment(sizes),
                FAST=launch.fast(),
                num_warps=WARPS,
            )
    expected_open = partial.view(segments) if pieces == 1 else partial.sum(1)
    return z, expected_open


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
