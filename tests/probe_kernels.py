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
