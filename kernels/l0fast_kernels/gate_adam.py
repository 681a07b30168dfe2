"""Adam on the gates of all layers, with the gradient of the Lagrangian term: one launch.

Every layer's log_alpha and moments lie in tensors of their own; a program takes a piece of one
layer's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import device_math, launch
from l0fast_kernels.hard_concrete import BLOCK, TILE, flat_or_table, piece_of_segment
from l0fast_kernels.lagrangian import Falling, tile, violations
from l0fast_kernels.launch import Launch

Pull = tuple[Tensor, Tensor, Tensor, Tensor, Falling | None]
"""Counts [L], weights [C, L], multiplier and target [C], and how the targets come down."""


@triton.jit
def one_minus_power(fall, exponent):
    """1 - (1 - fall)^exponent in float64, for a whole exponent >= 0."""
    power = exponent.to(tl.float64) * 0.0 + 1.0
    base = power - fall
    while exponent > 0:
        power = tl.where((exponent & 1) != 0, power * base, power)
        base = base * base
        exponent = exponent >> 1
    return 1.0 - power


@triton.jit
def unscaled(grad_ptr, scale_ptr, place, inside):
    """grad / scale, or grad where scale_ptr is None."""
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    if scale_ptr is not None:
        grad = tl.div_rn(grad, tl.load(scale_ptr) + grad * 0.0)
    return grad


@triton.jit
def slope(multiplier_ptr, weight_ptr, constraints, layers, CONSTRAINTS: tl.constexpr):
    """sum over c of multiplier[c] * weight[c, l] of this program's layer l"""
    c = tl.arange(0, CONSTRAINTS)
    weight_ptr += c * layers + tl.program_id(1)
    multiplier = tl.load(multiplier_ptr + c, mask=c < constraints, other=0.0)
    return tl.sum(multiplier * tl.load(weight_ptr, mask=c < constraints, other=0.0), 0)


@triton.jit(do_not_specialize=["constraints", "layers", "n"])
def gate_adam_kernel(
    log_alpha_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    step_ptr,
    grad_ptr,
    scale_ptr,
    offset_ptr,
    counts_ptr,
    weight_ptr,
    multiplier_ptr,
    target_ptr,
    start_ptr,
    taken_ptr,
    violation_ptr,
    lr,
    fall_1,
    fall_2,
    eps,
    open_shift,
    inverse_steps,
    constraints,
    layers,
    n,
    POWER: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LAYERS: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """g = grad / scale + p * (1 - p) * sum over c of multiplier[c] * weight[c, layer]
    m = m + (g - m) * (1 - beta_1)
    v = v + (g^2 - v) * (1 - beta_2)
    log_alpha -= lr / (1 - beta_1^t) * m / (sqrt(v / (1 - beta_2^t)) + eps)

    with p the open probability, and t the number of this step, which is stored with COUNTS, where
    one program has a whole layer. The first program also writes the violation (see `violations`).
    """
    segment_start, start, stop = piece_of_segment(offset_ptr, n, TILE)
    log_alpha_ptr = flat_or_table(log_alpha_ptr, segment_start, True)
    exp_avg_ptr = flat_or_table(exp_avg_ptr, segment_start, True)
    exp_avg_sq_ptr = flat_or_table(exp_avg_sq_ptr, segment_start, True)
    step_ptr = flat_or_table(step_ptr, segment_start * 0, True)
    step = tl.load(step_ptr) + 1.0
    step_size = lr / one_minus_power(fall_1, step.to(tl.int64)).to(tl.float32)
    root = tl.sqrt_rn(one_minus_power(fall_2, step.to(tl.int64)).to(tl.float32))
    pull = 0.0
    if counts_ptr is not None:
        pull = slope(multiplier_ptr, weight_ptr, constraints, layers, CONSTRAINTS)
    lane, first = tl.arange(0, BLOCK), start
    while first < stop:
        place, inside = first + lane, lane < stop - first
        log_alpha = tl.load(log_alpha_ptr + place, mask=inside, other=0.0)
        g = tl.zeros([BLOCK], dtype=tl.float32)
        if grad_ptr is not None:
            g += unscaled(grad_ptr, scale_ptr, place, inside)
        if counts_ptr is not None:
            p = device_math.open_probability(log_alpha, open_shift)
            g += device_math.open_probability_backward(pull, p)
        m = tl.load(exp_avg_ptr + place, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0)
        m, v = m + (g - m) * fall_1, v + (g * g - v) * fall_2
        tl.store(exp_avg_ptr + place, m, mask=inside)
        tl.store(exp_avg_sq_ptr + place, v, mask=inside)
        log_alpha -= step_size * m / (tl.sqrt_rn(v) / root + eps)
        tl.store(log_alpha_ptr + place, log_alpha, mask=inside)
        first += BLOCK
    if COUNTS:
        tl.debug_barrier()  # every thread has read it
        tl.store(step_ptr, step)
    if counts_ptr is not None:  # noqa: SIM102  # known when it is compiled
        if tl.program_id(1) + tl.program_id(0) == 0:
            c = tl.arange(0, CONSTRAINTS)
            found = violations(
                counts_ptr,
                weight_ptr,
                target_ptr,
                start_ptr,
                taken_ptr,
                inverse_steps,
                constraints,
                layers,
                POWER,
                CONSTRAINTS,
                LAYERS,
            )
            tl.store(violation_ptr + c, found, mask=c < constraints)


@functools.lru_cache(maxsize=256)
def _launch(sizes: tuple[int, ...], constraints: int, power: int) -> Launch:
    rows, columns = tile(constraints, len(sizes))
    pieces = triton.cdiv(max(sizes), TILE)
    options: dict[str, Any] = {
        "POWER": power,
        "CONSTRAINTS": rows,
        "LAYERS": columns,
        "COUNTS": pieces == 1,
        "BLOCK": BLOCK,
        "TILE": TILE,
    }
    return Launch(
        gate_adam_kernel, (pieces, len(sizes)), (constraints, len(sizes), sum(sizes)), options
    )


def gate_adam_(
    log_alphas: Sequence[Tensor],
    moments: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    grad: Tensor | None,
    scale: Tensor | None,
    numbers: tuple[float, float, float, float],
    open_shift: float,
    pull: Pull | None,
) -> Tensor | None:
    """One step of Adam on the gates of L layers, in place.

    Args:
        log_alphas: each float32, contiguous and not empty.
        moments: of each, exp_avg and exp_avg_sq like it, and the steps so far, float32 and 0-d.
        grad: float32 [N], the loss's gradients, end to end; None for none.
        scale: 0-d float32, by which they are too large; None for 1.
        numbers: lr, beta_1, beta_2 and eps.
        open_shift: of the gates' distribution (see `launch.Constants`).
        pull: what the constraints add, float32; None for nothing.

    Returns:
        The violation [C] with the gates as they were, if there is a pull.
    """
    sizes = tuple([one.numel() for one in log_alphas])
    counts = weights = multiplier = target = falling = violation = None
    if pull is not None:
        counts, weights, multiplier, target, falling = pull
        violation = launch.empty(target, target.shape)
    start, taken, steps, power = falling or (None, None, 1, 1)
    run = _launch(sizes, 0 if target is None else len(target), power)
    tables = [launch.table(one) for one in (log_alphas, *moments)]
    offsets = launch.offsets(sizes, log_alphas[0].device) if len(sizes) > 1 else None
    given = counts, weights, multiplier, target, start, taken, violation
    lr, beta_1, beta_2, eps = map(float, numbers)
    others = 1 - beta_1, 1 - beta_2, eps, open_shift, 1 / steps
    run(*tables, grad, scale, offsets, *given, numbers=(lr, *others))
    if not run.options["COUNTS"]:
        torch._foreach_add_(list(moments[2]), 1.0)  # pyright: ignore[reportPrivateImportUsage]
    return violation
