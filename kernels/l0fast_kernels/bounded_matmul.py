"""Matrix products whose sizes are read from the device: the grid is that of the largest, and
programs beyond the counts leave at once.

So nothing waits for the gates, and a captured CUDA graph goes on with other counts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch
from l0fast_kernels.packed_weight import rounded


class Tile(NamedTuple):
    """What one program computes, and with what."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# 128 x 256 reads 48 KiB for 2^21 products, three quarters of what two of 128 x 128 would ask of the
# L2 cache, which is what a product without multicast waits for. Two warp groups share its sums,
# 128 registers a thread, which leaves room for addresses; three stages take 144 KiB.
LARGE = Tile(128, 256, 64, warps=8, stages=3)
# Where there is less shared memory (99 KiB), or sums and operands share the registers.
SMALL = Tile(128, 128, 32, warps=8, stages=4)
# Exact float32 knows no matrix units.
FP32 = Tile(64, 64, 16, warps=4, stages=3)
# Sizes that are no multiples of 16 take their operands through registers.
ANY_SIZE = Tile(64, 64, 32, warps=4, stages=2)
ALIGNMENT = 16
LARGE_ON = (9, 10)
"""Major compute capabilities with 227 KiB of shared memory and asynchronous matrix units."""


def tile(dtype: torch.dtype, major: int, aligned: bool = True) -> Tile:
    """The tile for operands of `dtype` on a GPU of compute capability `major`.

    Args:
        aligned: whether the operands' rows begin at multiples of ALIGNMENT elements.
    """
    if dtype == torch.float32:
        return FP32
    if not aligned:
        return ANY_SIZE
    return LARGE if major in LARGE_ON else SMALL


# Tiles of so many neighbouring rows run together, and share what they read of b.
GROUP = 8


@triton.jit
def bounded_matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    bias_index_ptr,
    out_ptr,
    m_count_ptr,
    n_count_ptr,
    k_count_ptr,
    m,
    n,
    k,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    MULTIPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[i, j] = sum over l < k' of a[i, l] * b[l, j] + bias[bias_index[j]]      for j < n'
              = 0                                                              for n' <= j < n

    with m', n' and k' the counts rounded up; rows i >= m' of whole tiles are not written.
    """
    m_stop = rounded(m_count_ptr, m, MULTIPLE)
    n_stop = rounded(n_count_ptr, n, MULTIPLE)
    k_stop = rounded(k_count_ptr, k, MULTIPLE)
    tiles_n = tl.cdiv(n, BLOCK_N)
    in_group = GROUP * tiles_n
    program = tl.program_id(0)
    first_tile = program // in_group * GROUP
    tall = tl.minimum(tl.cdiv(m, BLOCK_M) - first_tile, GROUP)
    m_0 = (first_tile + program % in_group % tall) * BLOCK_M
    n_0 = program % in_group // tall * BLOCK_N
    if m_0 >= m_stop:
        return
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < m - m_0)[:, None] & (column < n - n_0)[None, :]
    out_ptr += m_0.to(tl.int64) * n + n_0
    out_ptrs = out_ptr + row[:, None] * n + column[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if n_0 >= n_stop:
        tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)
        return

    inner = tl.arange(0, BLOCK_K)
    a_ptr += m_0.to(tl.int64) * stride_am
    b_ptr += n_0.to(tl.int64) * stride_bn
    a_ptrs = a_ptr + row[:, None] * stride_am + inner[None, :] * stride_ak
    b_ptrs = b_ptr + inner[:, None] * stride_bk + column[None, :] * stride_bn
    for k_0 in range(0, k_stop, BLOCK_K):
        if EVEN:
            a = tl.load(a_ptrs)
            b = tl.load(b_ptrs)
        else:
            here = inner < k_stop - k_0
            a = tl.load(a_ptrs, mask=(row < m - m_0)[:, None] & here[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=here[:, None] & (column < n - n_0)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if bias_ptr is not None:
        unit = n_0 + column
        if bias_index_ptr is not None:
            unit = tl.load(bias_index_ptr + unit, mask=unit < n, other=0)
        bias = tl.load(bias_ptr + unit, mask=n_0 + column < n, other=0.0).to(tl.float32)
        total += bias[None, :]
    total = tl.where((column < n_stop - n_0)[None, :], total, 0.0)
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=inside)


def _precision(dtype: torch.dtype) -> str:
    """PyTorch's own choice for float32: exact, or by the matrix units."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def bounded_matmul_forward(
    a: Tensor,
    b: Tensor,
    m_count: Tensor | None,
    n_count: Tensor | None,
    k_count: Tensor | None,
    multiple: int,
    bias: Tensor | None = None,
    bias_index: Tensor | None = None,
) -> Tensor:
    """out [M, N] = a [M, K] @ b [K, N] (+ bias) before the counts; zero beyond n_count.

    Args:
        a, b: of one dtype, each with one stride of 1.
        m_count, n_count, k_count: int32 [1] on the device, or None for all.
        multiple: what the counts are rounded up to; a multiple of every tile's k.
        bias: [N], or None; bias_index: int32 [N], its order, or None.
    """
    (m, k), n = a.shape, b.shape[1]
    out = launch.empty(a, (m, n))
    major = torch.cuda.get_device_capability(a.device)[0] if a.is_cuda else 0
    aligned = all(stride == 1 or stride % ALIGNMENT == 0 for stride in (*a.stride(), *b.stride()))
    block = tile(a.dtype, major, aligned)
    even = m % block.m == 0 and n % block.n == 0 and k % block.k == 0
    if m and n:
        with launch.on(a):
            bounded_matmul_kernel[(triton.cdiv(m, block.m) * triton.cdiv(n, block.n),)](
                a,
                b,
                bias,
                bias_index,
                out,
                m_count,
                n_count,
                k_count,
                m,
                n,
                k,
                *a.stride(),
                *b.stride(),
                MULTIPLE=multiple,
                BLOCK_M=block.m,
                BLOCK_N=block.n,
                BLOCK_K=block.k,
                GROUP=GROUP,
                EVEN=even,
                PRECISION=_precision(a.dtype),
                num_warps=block.warps,
                num_stages=block.stages,
            )
    return out
