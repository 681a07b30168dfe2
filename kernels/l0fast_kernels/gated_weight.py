"""Weights multiplied by a gate for each of them (unstructured): one pass over them each way.

The kernels sample, mask and sum the expected L0 on the way; nothing but the result is written,
and the noise is drawn again in the backward. scaled_weight has gates for rows and columns.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import device_math, launch
from l0fast_kernels.launch import ALIGNMENT, Constants, Launch

# Elements a program: 16 a thread forward, 8 backward. Half of it costs 5 and 12 instructions an
# element more (the key schedule and the addresses are paid once a thread), twice of it spills
# over the registers that keep enough threads in flight.
FORWARD_BLOCK = 2048
BACKWARD_BLOCK = 1024


@triton.jit(do_not_specialize=["n"])
def gated_weight_kernel(
    weight_ptr,
    log_alpha_ptr,
    state_ptr,
    out_ptr,
    partial_ptr,
    noise_factor,
    slope,
    alpha_scale,
    gamma,
    width,
    open_shift,
    n,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """s = sigmoid((noise_scale * (log u - log(1 - u)) + log_alpha) / temperature)
    z = clamp(s * (zeta - gamma) + gamma, 0, 1)
    out = weight * z
    partial = sum of sigmoid(log_alpha - temperature * log(-gamma / zeta)) over the block

    with u from Philox, keyed by the state's (seed, step, tensor).
    """
    block = tl.program_id(0)
    first = block.to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.multiple_of(n - first, ALIGNMENT)
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    weight = tl.load(weight_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=float("-inf"))

    bits = device_math.random_words(first, seed, step, tensor, BLOCK, VECTOR)
    u = device_math.uniform(bits, FAST)
    s = device_math.concrete(log_alpha, u, noise_factor, alpha_scale, FAST)
    z = device_math.stretch(s, gamma, width)
    tl.store(out_ptr + first + lane, weight * z, mask=inside)
    # Lanes outside have log_alpha = -inf: their open probability is 0.
    p = device_math.open_probability(log_alpha, open_shift)
    tl.store(partial_ptr + block, tl.sum(p, 0))


@triton.jit(do_not_specialize=["n"])
def gated_weight_backward_kernel(
    dout_ptr,
    dopen_ptr,
    weight_ptr,
    log_alpha_ptr,
    state_ptr,
    dweight_ptr,
    dlog_alpha_ptr,
    noise_factor,
    slope,
    alpha_scale,
    gamma,
    width,
    open_shift,
    n,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    FAST: tl.constexpr,
):
    """dweight = dout * z
    dlog_alpha = dout * weight * [0 < z < 1] * (zeta - gamma) / temperature * s * (1 - s)
               + dopen * p * (1 - p)

    with s, z and u as in the forward (the noise is drawn again) and p the open probability.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    inside = lane < tl.multiple_of(n - first, ALIGNMENT)
    seed, step, tensor = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    dout = tl.load(dout_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + first + lane, mask=inside, other=0.0).to(tl.float32)
    log_alpha = tl.load(log_alpha_ptr + first + lane, mask=inside, other=0.0)

    bits = device_math.random_words(first, seed, step, tensor, BLOCK, VECTOR)
    u = device_math.uniform(bits, FAST)
    s = device_math.concrete(log_alpha, u, noise_factor, alpha_scale, FAST)
    z = device_math.stretch(s, gamma, width)
    dlog_alpha = device_math.stretch_backward(dout * weight, s, z, slope)
    if dopen_ptr is not None:
        p = device_math.open_probability(log_alpha, open_shift)
        dlog_alpha += device_math.open_probability_backward(tl.load(dopen_ptr), p)
    tl.store(dweight_ptr + first + lane, dout * z, mask=inside)
    tl.store(dlog_alpha_ptr + first + lane, dlog_alpha, mask=inside)


@functools.lru_cache(maxsize=1024)
def _launch(kernel: Any, block: int, n: int, vector: int) -> Launch:
    options = {
        "BLOCK": block,
        "VECTOR": vector,
        "ALIGNMENT": ALIGNMENT if n % ALIGNMENT == 0 else 1,
        "FAST": launch.fast(),
    }
    return Launch(kernel, (triton.cdiv(n, block), 1), (n,), options)


def gated_weight_forward(
    weight: Tensor, log_alpha: Tensor, state: Tensor, c: Constants, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Mask a weight by a freshly drawn gate for each element, and sum the open probabilities.

    Args:
        weight: float32, bfloat16 or float16, any shape.
        log_alpha: float32, of the weight's shape.
        state: int64 [3] on the same device: seed, step, tensor.
        c: the distribution.
        dtype: of the result; under autocast this pass is also the cast.

    Returns:
        weight * z (contiguous), and expected_open float32, 0-d.
    """
    weight, log_alpha = weight.contiguous(), log_alpha.contiguous()
    out = launch.empty(weight, weight.shape, dtype)
    n = weight.numel()
    blocks = triton.cdiv(n, FORWARD_BLOCK)
    partial = launch.empty(log_alpha, (blocks,))
    if n:
        run = _launch(gated_weight_kernel, FORWARD_BLOCK, n, launch.vector(weight, out))
        run(weight, log_alpha, state, out, partial, numbers=c)
    return out, partial.sum()


def gated_weight_backward(
    dout: Tensor,
    dopen: Tensor | None,
    weight: Tensor,
    log_alpha: Tensor,
    state: Tensor,
    c: Constants,
) -> tuple[Tensor, Tensor]:
    """dweight (the weight's dtype) and dlog_alpha (float32), in one pass, of the gradients of
    both results; a dopen that is None counts as zero. The rest as in the forward."""
    weight, log_alpha, dout = weight.contiguous(), log_alpha.contiguous(), dout.contiguous()
    dweight = launch.empty(weight, weight.shape)
    dlog_alpha = launch.empty(log_alpha, weight.shape)
    n = weight.numel()
    if n:
        vector = launch.vector(dout, weight)
        run = _launch(gated_weight_backward_kernel, BACKWARD_BLOCK, n, vector)
        given = dout, dopen, weight, log_alpha, state, dweight, dlog_alpha
        run(*given, numbers=c)
    return dweight, dlog_alpha
