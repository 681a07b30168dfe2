"""The end of a step: limits of gates, and the multipliers with them."""

from __future__ import annotations

import math

import torch

from l0fast.maths.advance import Ascent, Limits, advance_, hold_, within


def test_gates_that_are_drawn_are_kept_within_their_bound() -> None:
    log_alpha = torch.tensor([-9.0, -2.0, 9.0, -math.inf, math.nan])
    hold_(log_alpha, within(3.0))
    assert log_alpha[:4].tolist() == [-3.0, -2.0, 3.0, -3.0]
    assert bool(log_alpha[4].isnan())


def test_gates_that_are_settled_stay_on_their_side() -> None:
    log_alpha = torch.tensor([-9.0, -1.0, -0.9, 0.5, 9.0, math.nan])
    hold_(log_alpha, Limits(-5.0, -1.0, 0.0, 3.0))
    assert log_alpha[:5].tolist() == [-5.0, -5.0, 0.0, 0.5, 3.0]
    assert bool(log_alpha[5].isnan())


def test_all_layers_and_the_multipliers_move() -> None:
    gates = [torch.tensor([-9.0, 9.0]), torch.tensor([[0.5]]), torch.tensor([4.0])]
    limits = Limits(-5.0, -1.0, 0.0, 3.0), Limits(-5.0, -1.0, 0.0, 3.0), within(2.0)
    taken = torch.tensor(3.0)
    multiplier = torch.tensor([1.0])
    state = torch.tensor([0.5]), torch.zeros(1), torch.tensor(2.0)
    advance_(gates, limits, Ascent(multiplier, *state, math.inf, taken))
    assert [gate.tolist() for gate in gates] == [[-5.0, 3.0], [[0.5]], [2.0]]
    assert (multiplier.tolist(), float(taken)) == ([2.0], 4.0)
    advance_(gates, limits, None)
    assert (multiplier.tolist(), float(taken)) == ([2.0], 4.0)
