"""The gates of all layers: one launch forward, one backward.

Gates are tiny and many: the log_alpha of all layers lie end to end in one tensor [N], cut into L
segments, or each in a tensor of its own. A program takes a piece of one segment, so that a
segment's expected L0 is one sum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import device_math, launch
from l0fast_kernels.launch import ALIGNMENT, Constants, Launch

BLOCK = 1024
# Gates per program: whole layers of ordinary models, so that there is no second stage.
TILE = 16 * BLOCK


@triton.jit
def piece_of_segment(offset_ptr, n, TILE: tl.constexpr):
    """Where a program's segment starts, and where its piece of it starts and stops; all int64."""
    segment = tl.program_id(1)
    if offset_ptr is not None:
        segment_start = tl.load(offset_ptr + segment)
        segment_stop = tl.load(offset_ptr + segment + 1)
    else:
        segment_start = n * 0
        segment_stop = n
    start = segment_start + tl.program_id(0).to(tl.int64) * TILE
    return segment_start, start, tl.minimum(segment_stop, start + TILE)


@triton.jit
def flat_or_table(ptr, segment_start, TABLE: tl.constexpr):
    """Where element 0 of all would lie, if all lay as this program's segment does.

    With TABLE, ptr points at the address of each segment's own float32 tensor.
    """
    if TABLE:
        own = tl.load(ptr + tl.program_id(1)).to(tl.pointer_type(tl.float32))
        return own - segment_start
    else:
        return ptr


@triton.jit(do_not_specialize=["n"])
def hard_concrete_kernel(
    log_alpha_ptr,
    offset_ptr,
    state_ptr,
    z_ptr,
    open_ptr,
    noise_factor,
    slope,
    alpha_scale,
    gamma,
    width,
    open_shift,
    n,
    NOISE: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """s = sigmoid((noise_scale * (log u - log(1 - u)) + log_alpha) / temperature)
    z = clamp(s * (zeta - gamma) + gamma, 0, 1)
    expected_open = sum of sigmoid(log_alpha - temperature * log(-gamma / zeta))

    with u from Philox, keyed by the state's (seed, step, tensor); expected_open of the piece.
    Without NOISE, u = 1/2, and there is no sum.
    """
    segment_start, start, stop = piece_of_segment(offset_ptr, n, TILE)
    log_alpha_ptr = flat_or_table(log_alpha_ptr, segment_start, TABLE)
    seed, step, tensor = n, n, n  # unless there is noise
    if NOISE:
        seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)

    lane = tl.arange(0, BLOCK)
    expected = tl.zeros([BLOCK], dtype=tl.float32)
    first = start // BLOCK * BLOCK
    while first < stop:
        before = tl.multiple_of(start - first, ALIGNMENT)
        beyond = tl.multiple_of(stop - first, ALIGNMENT)
        inside = (lane >= before) & (lane < beyond)
        log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=float("-inf"))
        if NOISE:
            bits = device_math.random_words(first, seed, step, tensor, BLOCK, 4)
            u = device_math.uniform(bits, FAST)
            s = device_math.concrete(log_alpha, u, noise_factor, alpha_scale, FAST)
            # Lanes outside have log_alpha = -inf: their open probability is 0.
            expected += device_math.open_probability(log_alpha, open_shift)
        else:
            s = device_math.sigmoid2(log_alpha * -alpha_scale)
        tl.store(z_ptr + first + lane, device_math.stretch(s, gamma, width), mask=inside)
        first += BLOCK
    if NOISE:
        place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(open_ptr + place, tl.sum(expected, 0))


@triton.jit(do_not_specialize=["n"])
def hard_concrete_backward_kernel(
    log_alpha_ptr,
    dz_ptr,
    dopen_ptr,
    offset_ptr,
    state_ptr,
    dlog_alpha_ptr,
    noise_factor,
    slope,
    alpha_scale,
    gamma,
    width,
    open_shift,
    n,
    NOISE: tl.constexpr,
    TABLE: tl.constexpr,
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
    segment_start, start, stop = piece_of_segment(offset_ptr, n, TILE)
    log_alpha_ptr = flat_or_table(log_alpha_ptr, segment_start, TABLE)
    seed, step, tensor = n, n, n  # unless there is noise
    if NOISE:
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
            if NOISE:
                bits = device_math.random_words(first, seed, step, tensor, BLOCK, 4)
                u = device_math.uniform(bits, FAST)
                s = device_math.concrete(log_alpha, u, noise_factor, alpha_scale, FAST)
            else:
                s = device_math.sigmoid2(log_alpha * -alpha_scale)
            z = device_math.stretch(s, gamma, width)
            dlog_alpha += device_math.stretch_backward(dz, s, z, slope)
        if dopen_ptr is not None:
            p = device_math.open_probability(log_alpha, open_shift)
            dopen = tl.load(dopen_ptr + tl.program_id(1))
            dlog_alpha += device_math.open_probability_backward(dopen, p)
        tl.store(dlog_alpha_ptr + first + lane, dlog_alpha, mask=inside)
        first += BLOCK


class Segments:
    """The launches of a draw of so many gates in each layer."""

    def __init__(self, sizes: tuple[int, ...], table: bool, noise: bool) -> None:
        self.n = sum(sizes)
        self.pieces = max(1, triton.cdiv(max(sizes, default=0), TILE))
        options = {
            "NOISE": noise,
            "TABLE": table,
            "BLOCK": BLOCK,
            "TILE": TILE,
            "ALIGNMENT": ALIGNMENT if all(size % ALIGNMENT == 0 for size in sizes) else 1,
            "FAST": launch.fast(),
        }
        rest = (self.pieces, len(sizes)), (self.n,), options
        self.forward = Launch(hard_concrete_kernel, *rest)
        self.backward = Launch(hard_concrete_backward_kernel, *rest)


segments_of = functools.lru_cache(maxsize=256)(Segments)


def _given(
    log_alpha: Tensor | Sequence[Tensor], sizes: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the kernels take: log_alpha or its table, one like it, where the segments start."""
    if isinstance(log_alpha, Tensor):
        like = where = log_alpha.contiguous()
    else:
        like, where = log_alpha[0], launch.table(log_alpha)
    return where, like, launch.offsets(sizes, like.device) if len(sizes) > 1 else None


def hard_concrete_forward(
    log_alpha: Tensor | Sequence[Tensor],
    state: Tensor | None,
    sizes: tuple[int, ...],
    c: Constants,
) -> tuple[Tensor, Tensor | None]:
    """Sample N gates and sum their open probabilities over L segments.

    Args:
        log_alpha: float32 [N], or each segment's own, contiguous.
        state: int64 [3] on the same device: seed, step, tensor; None for gates without noise.
        sizes: the L segments' lengths, with sum N.
        c: the distribution.

    Returns:
        z float32 [N] and expected_open float32 [L], or None without noise.
    """
    segments = segments_of(sizes, not isinstance(log_alpha, Tensor), state is not None)
    where, like, offsets = _given(log_alpha, sizes)
    z = launch.empty(like, (segments.n,))
    if state is None:
        if segments.n:
            segments.forward(where, offsets, None, z, None, numbers=c)
        return z, None
    partial = launch.empty(like, (len(sizes), segments.pieces))
    if sizes:
        segments.forward(where, offsets, state, z, partial, numbers=c)
    return z, partial.view(len(sizes)) if segments.pieces == 1 else partial.sum(1)


def hard_concrete_backward(
    dz: Tensor | None,
    dopen: Tensor | None,
    log_alpha: Tensor | Sequence[Tensor],
    state: Tensor | None,
    sizes: tuple[int, ...],
    c: Constants,
) -> Tensor:
    """dlog_alpha float32 [N], of z's gradient dz [N] and expected_open's gradient dopen [L].

    A gradient that is None counts as zero. The rest as in the forward.
    """
    segments = segments_of(sizes, not isinstance(log_alpha, Tensor), state is not None)
    where, like, offsets = _given(log_alpha, sizes)
    dlog_alpha = launch.empty(like, (segments.n,))
    if segments.n:
        given = [None if one is None else one.contiguous() for one in (dz, dopen)]
        rest = offsets, state, dlog_alpha
        segments.backward(where, *given, *rest, numbers=c)
    return dlog_alpha
