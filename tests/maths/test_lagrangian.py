"""The Lagrangian term and the ascent of its multipliers: the reference."""

from __future__ import annotations

import math

import torch

from l0fast.maths.lagrangian import ascend_, lagrangian, lagrangian_backward, shares


def test_shares_of_one_group_and_of_several() -> None:
    counts, weights = torch.tensor([2.0, 3.0]), torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    assert shares(counts, weights).tolist() == [1.75, 2.0]
    assert shares(counts, weights[:1]).tolist() == [1.75]


def test_the_backward_is_autograds() -> None:
    counts = torch.rand(5, dtype=torch.float64, requires_grad=True)
    for constraints in (1, 3):
        weights = torch.rand(constraints, 5, dtype=torch.float64)
        multiplier, target = torch.rand(2, constraints, dtype=torch.float64)
        term, violation = lagrangian(counts, weights, multiplier, target)
        torch.testing.assert_close(violation, weights @ counts - target)
        torch.testing.assert_close(term, multiplier @ violation)
        dterm = torch.tensor(3.0, dtype=torch.float64)
        (dcounts,) = torch.autograd.grad(term, counts, dterm)
        torch.testing.assert_close(lagrangian_backward(dterm, weights, multiplier), dcounts)


def test_an_ascent_with_restarts_and_a_limit() -> None:
    multiplier = torch.tensor([1.0, 1.0, 1.0, 0.0, math.nan])
    violation = torch.tensor([0.5, 0.0, -0.5, -0.5, 0.5])
    restarts = torch.zeros(5)
    ascend_(multiplier, violation, restarts, torch.tensor(4.0), 2.5)
    assert multiplier[:4].tolist() == [2.5, 1.0, 0.0, 0.0]
    assert math.isnan(multiplier[4])
    assert restarts.tolist() == [0, 0, 1, 0, 0]
