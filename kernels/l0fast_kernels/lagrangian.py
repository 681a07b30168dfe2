"""The Lagrangian term, its gradient, and the ascent of the multipliers: one launch each.

There are few constraints and few layers: each launch is one program.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch
from l0fast_kernels.launch import Launch

# Elements of a tile of the weights [C, L].
TILE = 4096
MOST_CONSTRAINTS = 1024

Falling = tuple[Tensor, Tensor, int, int]
"""How targets come down: from start [C], by the steps taken [], in so many steps, by a power."""


@triton.jit
def violations(
    counts_ptr,
    weight_ptr,
    target_ptr,
    start_ptr,
    taken_ptr,
    inverse_steps,
    constraints,
    layers,
    POWER: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """violation[c] = sum over l of weight[c, l] * counts[l] - target in force[c]

    The target in force is target[c], or with a start, where it is higher,
        target[c] + (start[c] - target[c]) * max(0, 1 - taken / steps)^power
    """
    c = tl.arange(0, CONSTRAINTS)
    lane = tl.arange(0, LAYERS)
    asked = c < constraints
    share = tl.zeros([CONSTRAINTS], dtype=tl.float32)
    first = layers * 0
    while first < layers:
        layer = first + lane
        counts = tl.load(counts_ptr + layer, mask=layer < layers, other=0.0)
        inside = asked[:, None] & (layer < layers)[None, :]
        offset = c[:, None] * layers + layer[None, :]
        weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
        share += tl.sum(weight * counts[None, :], 1)
        first += LAYERS
    target = tl.load(target_ptr + c, mask=asked, other=0.0)
    if start_ptr is not None:
        start = tl.load(start_ptr + c, mask=asked, other=0.0)
        left = tl.maximum(1.0 - tl.load(taken_ptr) * inverse_steps, 0.0)
        fraction = left
        for _ in tl.static_range(POWER - 1):
            fraction *= left
        target += (tl.where(start > target, start, target) - target) * fraction
    return share - target


@triton.jit
def ascend(
    multiplier_ptr,
    violation_ptr,
    restarts_ptr,
    lr_ptr,
    most,
    constraints,
    CONSTRAINTS: tl.constexpr,
):
    """restarts[c] += violation[c] < 0 and multiplier[c] > 0
    multiplier[c] = 0 if violation[c] < 0 else min(multiplier[c] + lr * violation[c], most)
    """
    c = tl.arange(0, CONSTRAINTS)
    asked = c < constraints
    violation = tl.load(violation_ptr + c, mask=asked, other=0.0)
    multiplier = tl.load(multiplier_ptr + c, mask=asked, other=0.0)
    restarts = tl.load(restarts_ptr + c, mask=asked, other=0.0)
    satisfied = violation < 0
    restarts += tl.where(satisfied & (multiplier > 0), 1.0, 0.0)
    moved = multiplier + tl.load(lr_ptr) * violation
    moved = tl.where(moved > most, most, moved)  # which leaves NaN as it is
    tl.store(restarts_ptr + c, restarts, mask=asked)
    tl.store(multiplier_ptr + c, tl.where(satisfied, 0.0, moved), mask=asked)


@triton.jit(do_not_specialize=["constraints", "layers"])
def lagrangian_kernel(
    counts_ptr,
    weight_ptr,
    multiplier_ptr,
    target_ptr,
    start_ptr,
    taken_ptr,
    term_ptr,
    violation_ptr,
    inverse_steps,
    constraints,
    layers,
    POWER: tl.constexpr,
    CONSTRAINTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """term = sum over c of multiplier[c] * violation[c], with each violation (see `violations`)"""
    violation = violations(
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
    c = tl.arange(0, CONSTRAINTS)
    multiplier = tl.load(multiplier_ptr + c, mask=c < constraints, other=0.0)
    tl.store(violation_ptr + c, violation, mask=c < constraints)
    tl.store(term_ptr, tl.sum(multiplier * violation, 0))


@triton.jit(do_not_specialize=["constraints", "layers"])
def lagrangian_backward_kernel(
    dterm_ptr,
    weight_ptr,
    multiplier_ptr,
    dcounts_ptr,
    constraints,
    layers,
    CONSTRAINTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """dcounts[l] = dterm * sum over c of multiplier[c] * weight[c, l]"""
    c = tl.arange(0, CONSTRAINTS)
    lane = tl.arange(0, LAYERS)
    asked = c < constraints
    dterm = tl.load(dterm_ptr)
    multiplier = tl.load(multiplier_ptr + c, mask=asked, other=0.0)
    first = layers * 0
    while first < layers:
        layer = first + lane
        inside = asked[:, None] & (layer < layers)[None, :]
        offset = c[:, None] * layers + layer[None, :]
        weight = tl.load(weight_ptr + offset, mask=inside, other=0.0)
        dcounts = dterm * tl.sum(weight * multiplier[:, None], 0)
        tl.store(dcounts_ptr + layer, dcounts, mask=layer < layers)
        first += LAYERS


@triton.jit(do_not_specialize=["constraints", "most"])
def ascend_kernel(
    multiplier_ptr,
    violation_ptr,
    restarts_ptr,
    lr_ptr,
    constraints,
    most,
    CONSTRAINTS: tl.constexpr,
):
    """See `ascend`."""
    ascend(multiplier_ptr, violation_ptr, restarts_ptr, lr_ptr, most, constraints, CONSTRAINTS)


def tile(constraints: int, layers: int) -> tuple[int, int]:
    """How many rows and columns of the weights a program has at a time."""
    rows = triton.next_power_of_2(max(constraints, 1))
    return rows, min(TILE // rows, max(16, triton.next_power_of_2(layers)))


@functools.lru_cache(maxsize=256)
def _forward(constraints: int, layers: int, power: int) -> Launch:
    rows, columns = tile(constraints, layers)
    options = {"POWER": power, "CONSTRAINTS": rows, "LAYERS": columns}
    return Launch(lagrangian_kernel, (1, 1), (constraints, layers), options)


@functools.lru_cache(maxsize=256)
def _backward(constraints: int, layers: int) -> Launch:
    rows, columns = tile(constraints, layers)
    options = {"CONSTRAINTS": rows, "LAYERS": columns}
    return Launch(lagrangian_backward_kernel, (1, 1), (constraints, layers), options)


@functools.lru_cache(maxsize=256)
def _ascent(constraints: int, most: float) -> Launch:
    options = {"CONSTRAINTS": triton.next_power_of_2(constraints)}
    return Launch(ascend_kernel, (1, 1), (constraints, most), options)


def lagrangian_forward(
    counts: Tensor,
    weights: Tensor,
    multiplier: Tensor,
    target: Tensor,
    falling: Falling | None = None,
) -> tuple[Tensor, Tensor]:
    """term [] and violation [C], of counts [L], weights [C, L], multiplier and target [C].

    All are float32 and contiguous; C is at most MOST_CONSTRAINTS.
    """
    term = launch.empty(counts, ())
    violation = launch.empty(counts, multiplier.shape)
    start, taken, steps, power = falling or (None, None, 1, 1)
    forward = _forward(*weights.shape, power)
    given = counts, weights, multiplier, target, start, taken
    forward(*given, term, violation, numbers=(1 / steps,))
    return term, violation


def lagrangian_backward(dterm: Tensor, weights: Tensor, multiplier: Tensor) -> Tensor:
    """dcounts [L], of the term's gradient []. The rest as in the forward."""
    dcounts = launch.empty(weights, weights.shape[1:])
    backward = _backward(*weights.shape)
    backward(dterm, weights, multiplier, dcounts)
    return dcounts


def ascend_(
    multiplier: Tensor, violation: Tensor, restarts: Tensor, lr: Tensor, most: float
) -> None:
    """Moves multiplier and restarts [C] in place; all are float32, lr is []."""
    _ascent(len(multiplier), most)(multiplier, violation, restarts, lr)
