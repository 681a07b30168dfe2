"""Device functions: the mathematics of the kernels, on loaded values, with no loads of its own.

Written for instruction count, since a gate costs more arithmetic than memory if done naively:
logarithms and exponentials are base 2 (one instruction each on the chip), a reciprocal is a
squared rsqrt, and one Philox call serves four elements. ``FAST`` selects the two operations that
exist on NVIDIA GPUs only; with ``FAST=False`` the same functions run in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

# Both constants are exact in float32; see l0fast.philox, which has the same two.
UNIFORM_SCALE = tl.constexpr(1 - 34 / 2**24)
UNIFORM_SHIFT = tl.constexpr(52 / 2**24 - 1)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def philox(lo, hi, step, tensor, seed_lo, seed_hi):
    """Philox4x32-10 of counter (lo, hi, step, tensor) and key (seed_lo, seed_hi), all uint32.

        c0, c1, c2, c3 = hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)
        k0, k1         = k0 + W0, k1 + W1                       ten times, modulo 2^32

    The words are those of ``tl.randint4x``; a 32 x 32 -> 64 bit product gives both halves in one
    instruction, where ``umulhi`` and ``mul`` take two.
    """
    c0, c1, c2, c3 = lo, hi, step, tensor
    k0, k1 = seed_lo, seed_hi
    for _ in tl.static_range(10):
        product_0 = tl.mul(c0.to(tl.uint64), 0xD2511F53, sanitize_overflow=False)
        product_1 = tl.mul(c2.to(tl.uint64), 0xCD9E8D57, sanitize_overflow=False)
        c0 = (product_1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product_1.to(tl.uint32)
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product_0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def random_words(first, seed, step, tensor, SIZE: tl.constexpr, VECTOR: tl.constexpr):
    """uint32 [SIZE]: word i % 4 of counter i // 4, for elements i = first .. first + SIZE - 1.

    ``first`` (int64) is a multiple of SIZE, a power of two: the counters of a block then share
    their upper 32 bits, and the addition of a lane has no carry.

    A thread holds VECTOR neighbours, as many as make a 128-bit access of the narrowest tensor: 4,
    or 8 drawn from two counters. Drawn in the layout of the loads, nothing is moved between
    threads; the joins only rename registers.
    """
    counter = first // 4
    lo = counter.to(tl.uint32)
    hi = (counter >> 32).to(tl.uint32)
    step, tensor = step.to(tl.uint32), tensor.to(tl.uint32)
    seed_lo, seed_hi = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    if VECTOR == 4:
        lo += tl.arange(0, SIZE // 4).to(tl.uint32)
        a0, a1, a2, a3 = philox(lo, hi, step, tensor, seed_lo, seed_hi)
        words = tl.join(tl.join(a0, a2), tl.join(a1, a3))
    else:
        lo += tl.arange(0, SIZE // 8).to(tl.uint32) * 2
        a0, a1, a2, a3 = philox(lo, hi, step, tensor, seed_lo, seed_hi)
        b0, b1, b2, b3 = philox(lo + 1, hi, step, tensor, seed_lo, seed_hi)
        even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
        odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
        words = tl.join(even, odd)
    return words.reshape(SIZE)


@triton.jit
def uniform(bits, FAST: tl.constexpr):
    """u = fma(as_float(bits >> 9 | 0x3f800000), SCALE, SHIFT), strictly inside (1e-6, 1 - 1e-6).

    The 23 high bits become the mantissa of a number in [1, 2); no integer is converted.
    """
    mantissa = ((bits >> 9) | 0x3F800000).to(tl.float32, bitcast=True)
    if FAST:
        return tl.fma(mantissa, UNIFORM_SCALE, UNIFORM_SHIFT)
    else:
        # The interpreter's fma rounds twice. This sum is exact, and rounded once, as on the chip.
        return (mantissa.to(tl.float64) * UNIFORM_SCALE + UNIFORM_SHIFT).to(tl.float32)


@triton.jit
def log2(x, FAST: tl.constexpr):
    """log2(x) of a normal positive x; on the chip one instruction (tl.log2 takes 27)."""
    if FAST:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def sigmoid2(minus_x):
    """1 / (1 + 2^minus_x), the sigmoid of x ln 2; a sign flip is free in the caller's constants.

    The reciprocal is a squared rsqrt: no division, and 0 where the power overflows.
    """
    root = tl.rsqrt(tl.exp2(minus_x) + 1.0)
    return root * root


@triton.jit
def concrete(log_alpha, u, noise_factor, alpha_scale, FAST: tl.constexpr):
    """s = sigmoid((noise_scale * (log u - log(1 - u)) + log_alpha) / temperature), unstretched.

    In base 2, with noise_factor = noise_scale / temperature, alpha_scale = log2(e) / temperature.
    """
    minus_noise = log2(1.0 - u, FAST) - log2(u, FAST)
    return sigmoid2(minus_noise * noise_factor - log_alpha * alpha_scale)


@triton.jit
def stretch(s, gamma, width):
    """z = clamp(s * (zeta - gamma) + gamma, 0, 1), with width = zeta - gamma."""
    return tl.clamp(s * width + gamma, 0.0, 1.0)


@triton.jit
def stretch_backward(dz, s, z, slope):
    """dlog_alpha = dz * [0 < z < 1] * slope * s * (1 - s), with slope = width / temperature."""
    inside = (z > 0.0) & (z < 1.0)
    return tl.where(inside, dz * slope * (s - s * s), 0.0)


@triton.jit
def open_probability(log_alpha, open_shift):
    """P(z > 0) = sigmoid(log_alpha - temperature * log(-gamma / zeta)), open_shift in base 2."""
    return sigmoid2(log_alpha * -LOG2E - open_shift)


@triton.jit
def open_probability_backward(dp, p):
    """dlog_alpha = dp * p * (1 - p)."""
    return dp * (p - p * p)
