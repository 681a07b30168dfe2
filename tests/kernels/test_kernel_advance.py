"""The kernel of l0fast_kernels.advance, against the reference: bit for bit, but for one sum."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from l0fast.constraints.settle import kept_open
from l0fast.maths import advance as maths
from l0fast.maths.advance import Ascent, within
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.kernels.kernel_checks import DISTRIBUTION, OTHER


def gates() -> list[Tensor]:
    found = [8 * torch.randn(size) for size in (300, 1, 16390)]
    found[0][:4] = torch.tensor([math.inf, -math.inf, math.nan, 100.0])
    return found


def state(constraints: int) -> list[Tensor]:
    violation = torch.randn(constraints)
    violation[0] = 0
    rest = torch.ones(constraints), torch.tensor(0.5), torch.tensor(41.0)
    return [torch.randn(constraints).clamp_(0.0, 0.7), violation, *rest]


@kernel_test
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("constraints", [0, 1, 5])
@pytest.mark.parametrize("limit", [math.inf, 0.7])
def test_the_end_of_a_step_is_the_references(settled: bool, constraints: int, limit: float) -> None:
    from l0fast_kernels import advance_

    limits = tuple(
        kept_open(of) if settled else within(of.bound) for of in (DISTRIBUTION, OTHER, DISTRIBUTION)
    )
    both = []
    given, moving = gates(), state(max(constraints, 1))
    for device, run in (("cpu", maths.advance_), (DEVICE, advance_)):
        mine = [one.clone().to(device) for one in given]
        multiplier, violation, restarts, lr, taken = [one.clone().to(device) for one in moving]
        counted = taken if constraints == 5 else None
        ascent = Ascent(multiplier, violation, restarts, lr, limit, counted)
        run(mine, limits, ascent if constraints else None)
        both.append([one.cpu() for one in (*mine, multiplier, violation, restarts, lr, taken)])
    # One rounding less in the multiplier: the kernel's product and sum are fused.
    for expected, got in zip(*both, strict=True):
        exact = got is not both[1][len(given)]
        rtol = 0.0 if exact else 2e-7
        torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol, equal_nan=True)
    assert float(both[1][-1]) == 41.0 + (constraints == 5)
    assert not torch.equal(both[1][2], given[2])


@kernel_test
def test_one_layer_alone() -> None:
    from l0fast_kernels import advance_

    gate = torch.tensor([-9.0, 0.5, 9.0], device=DEVICE)
    advance_([gate], (within(3.0),), None)
    assert gate.tolist() == [-3.0, 0.5, 3.0]
