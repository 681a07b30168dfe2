"""Kernels that only tests launch. Imports Triton: import it inside a test."""

from __future__ import annotations

import triton
import triton.language as tl

from l0fast_kernels import device_math


@triton.jit(do_not_specialize=["first"])
def noise_kernel(
    state_ptr,
    word_ptr,
    triton_word_ptr,
    uniform_ptr,
    first,
    SIZE: tl.constexpr,
    VECTOR: tl.constexpr,
    FAST: tl.constexpr,
):
    """The words and uniforms of elements first .. first + SIZE - 1, and Triton's own words."""
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    first = first.to(tl.int64)
    lane = tl.arange(0, SIZE)
    words = device_math.random_words(first, seed, step, tensor, SIZE, VECTOR)
    tl.store(word_ptr + lane, words.to(tl.int64))
    tl.store(uniform_ptr + lane, device_math.uniform(words, FAST))
    counter = first // 4 + tl.arange(0, SIZE // 4)
    w0, w1, w2, w3 = tl.randint4x(seed, counter)
    theirs = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(SIZE)
    tl.store(triton_word_ptr + lane, theirs.to(tl.uint32, bitcast=True).to(tl.int64))


@triton.jit
def naive_kernel(
    weight_ptr,
    log_alpha_ptr,
    out_ptr,
    seed,
    n,
    temperature,
    gamma,
    zeta,
    BLOCK: tl.constexpr,
):
    """The gate as one would first write it: a canary, to show that the counter counts."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + index, mask=index < n)
    log_alpha = tl.load(log_alpha_ptr + index, mask=index < n)
    u = tl.minimum(tl.maximum(tl.rand(seed, index), 1e-6), 1 - 1e-6)
    s = tl.sigmoid((tl.log(u) - tl.log(1 - u) + log_alpha) / temperature)
    z = tl.minimum(tl.maximum(s * (zeta - gamma) + gamma, 0.0), 1.0)
    tl.store(out_ptr + index, weight * z, mask=index < n)


@triton.jit
def gathering_matmul_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    index_ptr,
    k_count_ptr,
    n,
    stride_am,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A product that picks its open columns itself, and masks the count's tail: another canary."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    k_stop = tl.load(k_count_ptr)
    for k_0 in range(0, k_stop, BLOCK_K):
        inner = k_0 + tl.arange(0, BLOCK_K)
        here = inner < k_stop
        unit = tl.load(index_ptr + inner, mask=here, other=0)
        a = tl.load(a_ptr + row[:, None] * stride_am + unit[None, :], mask=here[None, :], other=0.0)
        b = tl.load(
            b_ptr + unit[:, None] + column[None, :] * stride_bk, mask=here[:, None], other=0.0
        )
        total = tl.dot(a, b, total)
    tl.store(out_ptr + row[:, None] * n + column[None, :], total.to(out_ptr.dtype.element_ty))
