"""The Lagrangian term, its gradient, and the ascent of the multipliers: one launch each.

There are few constraints and few layers: each launch is one program.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch

# Elements of a tile of the weights [C, L].
TILE = 4096
MOST_CONSTRAINTS = 1024


@triton.jit(do_not_specialize=["constraints", "layers"])
def lagrangian_kernel(
    counts_ptr,
    weight_ptr,
    multiplier_ptr,
    target_ptr,
    term_ptr,
    violation_ptr,
    constraints,
    layers,
    CONSTRAINTS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    """violation[c] = sum over l of weight[c, l] * counts[l] - target[c]
    term = sum over c of multiplier[c] * violation[c]
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
    violation = share - tl.load(target_ptr + c, mask=asked, other=0.0)
    multiplier = tl.load(multiplier_ptr + c, mask=asked, other=0.0)
    tl.store(violation_ptr + c, violation, mask=asked)
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


@triton.jit(do_not_specialize=["constraints", "limit"])
def ascend_kernel(
    multiplier_ptr,
    violation_ptr,
    restarts_ptr,
    lr_ptr,
    constraints,
    limit,
    CONSTRAINTS: tl.constexpr,
):
    """restarts[c] += violation[c] < 0 and multiplier[c] > 0
    multiplier[c] = 0 if violation[c] < 0 else min(multiplier[c] + lr * violation[c], limit)
    """
    c = tl.arange(0, CONSTRAINTS)
    asked = c < constraints
    violation = tl.load(violation_ptr + c, mask=asked, other=0.0)
    multiplier = tl.load(multiplier_ptr + c, mask=asked, other=0.0)
    restarts = tl.load(restarts_ptr + c, mask=asked, other=0.0)
    satisfied = violation < 0
    restarts += tl.where(satisfied & (multiplier > 0), 1.0, 0.0)
    moved = multiplier + tl.load(lr_ptr) * violation
    moved = tl.where(moved > limit, limit, moved)  # which leaves NaN as it is
    tl.store(restarts_ptr + c, restarts, mask=asked)
    tl.store(multiplier_ptr + c, tl.where(satisfied, 0.0, moved), mask=asked)


@functools.lru_cache(maxsize=256)
def _launches(constraints: int, layers: int) -> tuple[launch.Launch, launch.Launch]:
    rows = triton.next_power_of_2(constraints)
    columns = min(TILE // rows, max(16, triton.next_power_of_2(layers)))
    rest = (1, 1), (constraints, layers), {"CONSTRAINTS": rows, "LAYERS": columns}
    return launch.Launch(lagrangian_kernel, *rest), launch.Launch(lagrangian_backward_kernel, *rest)


@functools.lru_cache(maxsize=256)
def _ascent(constraints: int, limit: float) -> launch.Launch:
    options = {"CONSTRAINTS": triton.next_power_of_2(constraints)}
    return launch.Launch(ascend_kernel, (1, 1), (constraints, limit), options)


def lagrangian_forward(
    counts: Tensor, weights: Tensor, multiplier: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """term [] and violation [C], of counts [L], weights [C, L], multiplier and target [C].

    All are float32 and contiguous; C is at most MOST_CONSTRAINTS.
    """
    term = launch.empty(counts, ())
    violation = launch.empty(counts, multiplier.shape)
    forward, _ = _launches(*weights.shape)
    forward(counts, weights, multiplier, target, term, violation)
    return term, violation


def lagrangian_backward(dterm: Tensor, weights: Tensor, multiplier: Tensor) -> Tensor:
    """dcounts [L], of the term's gradient []. The rest as in the forward."""
    dcounts = launch.empty(weights, weights.shape[1:])
    _, backward = _launches(*weights.shape)
    backward(dterm, weights, multiplier, dcounts)
    return dcounts


def ascend_(
    multiplier: Tensor, violation: Tensor, restarts: Tensor, lr: Tensor, limit: float
) -> None:
    """Moves multiplier and restarts [C] in place; all are float32, lr is []."""
    _ascent(len(multiplier), limit)(multiplier, violation, restarts, lr)
