"""Dual ascent: its formula, its restarts, and convergence to multipliers known in closed form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, DualAscent, L0Linear
from l0fast.draw import gated_layers


class Layers(nn.Module):
    """Two gated layers of different group sizes (4 and 2 weights a gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = L0Linear(3, 4, density_init=0.9)
        self.b = L0Linear(5, 2, density_init=0.9)


# loss(p) = sum_i stiffness_i / 2 * (1 - p_i)^2 over the open probabilities p of all gates.
STIFFNESS = {
    "a": torch.tensor([2.0, 2.5, 4.0], dtype=torch.float64),
    "b": torch.tensor([1.2, 1.5, 2.0, 3.0, 6.0], dtype=torch.float64),
}
GROUP_SIZE = {"a": 4, "b": 2}


def solution(groups: list[list[str]], targets: list[float]) -> tuple[dict[str, Tensor], Tensor]:
    """p* and lambda* of: minimise the loss subject to sum_i share_i p_i <= target, each group.

    With share_i = group size / parameters of the group, stationarity of the Lagrangian says
    stiffness_i (p_i - 1) + lambda share_i = 0, so p_i = 1 - lambda share_i / stiffness_i; put into
    the constraint, which is tight (shares add up to 1),
    lambda = (1 - target) / sum_i share_i^2 / stiffness_i.
    """
    p: dict[str, Tensor] = {}
    multipliers: list[float] = []
    for names, target in zip(groups, targets, strict=True):
        total = sum(GROUP_SIZE[name] * len(STIFFNESS[name]) for name in names)
        share = {name: GROUP_SIZE[name] / total for name in names}
        spread = sum(float((share[name] ** 2 / STIFFNESS[name]).sum()) for name in names)
        multipliers.append((1 - target) / spread)
        for name in names:
            p[name] = 1 - multipliers[-1] * share[name] / STIFFNESS[name]
    assert all(bool(((q > 0.05) & (q < 0.95)).all()) for q in p.values())  # inside the bounds
    return p, torch.tensor(multipliers, dtype=torch.float64)


def descend(
    model: nn.Module, constraint: DensityConstraint, steps: int, lr: float
) -> list[tuple[Tensor, Tensor]]:
    """Gradient descent on log_alpha, ascent on the multipliers; [(multiplier, violation)]."""
    layers = gated_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    path: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        parts = [
            (STIFFNESS[name] / 2 * (1 - layer.open_probability()) ** 2).sum()
            for name, layer in layers.items()
        ]
        optimizer.zero_grad()
        (torch.stack(parts).sum() + constraint()).backward()
        optimizer.step()
        constraint.step()
        path.append((constraint.multiplier.clone(), constraint.violation))
    return path


@pytest.mark.parametrize(
    ("target", "groups", "targets"),
    [
        (0.5, [["a", "b"]], [0.5]),
        ({"a": 0.6, "b": 0.5}, [["a"], ["b"]], [0.6, 0.5]),
        ({"[ab]": 0.45}, [["a", "b"]], [0.45]),
    ],
    ids=["model", "layers", "pattern"],
)
def test_converges_to_the_known_solution(
    target: float | dict[str, float], groups: list[list[str]], targets: list[float]
) -> None:
    model = Layers().double()
    constraint = DensityConstraint(model, target, dual=DualAscent(1.0, restarts=False))
    p, multipliers = solution(groups, targets)
    descend(model, constraint, 300, lr=4.0)
    torch.testing.assert_close(constraint.multiplier, multipliers, rtol=1e-9, atol=0)
    torch.testing.assert_close(constraint.densities(), constraint.target, rtol=0, atol=1e-9)
    for name, layer in gated_layers(model).items():
        torch.testing.assert_close(layer.open_probability(), p[name], rtol=0, atol=1e-9)
    assert constraint.restarts.tolist() == [0] * len(targets)


def test_converges_with_restarts_from_above() -> None:
    """Overdamped, the density comes down to its target and not below: nothing to restart."""
    model = Layers().double()
    constraint = DensityConstraint(model, 0.5, dual=DualAscent(0.2, restarts=True))
    p, multipliers = solution([["a", "b"]], [0.5])
    path = descend(model, constraint, 600, lr=4.0)
    assert all(float(violation) > 0 for _, violation in path)
    assert float(constraint.restarts) == 0
    torch.testing.assert_close(constraint.multiplier, multipliers, rtol=2e-3, atol=0)
    for name, layer in gated_layers(model).items():
        torch.testing.assert_close(layer.open_probability(), p[name], rtol=0, atol=1e-3)


def test_a_slack_constraint_ends_with_multiplier_zero() -> None:
    """Without a constraint the loss wants p = 1 in both layers; "b" is then allowed."""
    model = Layers().double()
    constraint = DensityConstraint(model, {"a": 0.6, "b": 1.0}, dual=DualAscent(1.0, False))
    constraint.multiplier.fill_(0.1)
    p, multipliers = solution([["a"]], [0.6])
    descend(model, constraint, 300, lr=4.0)
    assert float(constraint.multiplier[0]) == pytest.approx(float(multipliers[0]), rel=1e-9)
    assert float(constraint.multiplier[1]) == 0
    torch.testing.assert_close(model.a.open_probability(), p["a"], rtol=0, atol=1e-9)
    assert float(model.b.open_probability().detach().min()) > 0.98


def test_restarts_leave_the_feasible_region_sooner() -> None:
    """Too large a multiplier drives the density below its target; a restart stops that at once."""
    lowest: dict[bool, float] = {}
    for restarts in (True, False):
        model = Layers().double()
        constraint = DensityConstraint(model, 0.5, dual=DualAscent(0.5, restarts))
        constraint.multiplier.fill_(20.0)
        path = descend(model, constraint, 100, lr=1.0)
        multipliers = torch.cat([multiplier for multiplier, _ in path])
        satisfied = torch.cat([violation for _, violation in path]) < 0
        assert bool(satisfied.any())
        if restarts:
            assert bool((multipliers[satisfied] == 0).all())
            before = torch.cat([torch.tensor([20.0]), multipliers[:-1]])
            assert int(constraint.restarts) == int((satisfied & (before > 0)).sum()) > 0
        else:
            assert bool((multipliers[satisfied] > 0).any())
            assert int(constraint.restarts) == 0
        lowest[restarts] = min(float(violation) for _, violation in path)
    assert lowest[False] < 2 * lowest[True] < 0


@pytest.mark.parametrize(
    ("restarts", "multiplier", "violation", "moved", "counted"),
    [
        (True, 0.0, 0.5, 0.05, 0),
        (True, 1.0, 0.5, 1.05, 0),
        (True, 1.0, 0.0, 1.0, 0),  # tight, not strictly satisfied: no restart
        (True, 1.0, -1e-6, 0.0, 1),
        (True, 0.01, -0.5, 0.0, 1),  # the ascent alone would have reached 0, too
        (True, 0.0, -0.5, 0.0, 0),  # it was 0 already
        (False, 1.0, -0.5, 0.95, 0),
        (False, 0.01, -0.5, 0.0, 0),
    ],
)
def test_one_step(
    restarts: bool, multiplier: float, violation: float, moved: float, counted: int
) -> None:
    values, counts = torch.tensor([multiplier, 7.0]), torch.zeros(2)
    DualAscent(0.1, restarts).step_(
        values, torch.tensor([violation, 0.0]), torch.tensor(0.1), counts
    )
    assert values.tolist() == pytest.approx([moved, 7.0])
    assert counts.tolist() == [counted, 0]


def test_the_multiplier_is_the_sum_of_the_violations() -> None:
    """lambda after T steps = lr * sum of the violations seen, while the constraint is violated."""
    model = Layers().double()
    constraint = DensityConstraint(model, 0.3, dual=DualAscent(1e-3))
    path = descend(model, constraint, 50, lr=0.1)
    violations = torch.cat([violation for _, violation in path])
    assert bool((violations > 0).all())
    torch.testing.assert_close(torch.cat([m for m, _ in path]), 1e-3 * violations.cumsum(0))


def test_the_dual_learning_rate_may_change() -> None:
    model = Layers()
    constraint = DensityConstraint(model, 0.4, dual=DualAscent(0.1))
    constraint()
    constraint.dual_lr.fill_(0.2)
    constraint.step()
    assert float(constraint.multiplier) == pytest.approx(0.2 * (0.9 - 0.4), rel=1e-5)
    constraint.dual_lr.zero_()
    constraint.step()
    assert float(constraint.multiplier) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("lr", [-1e-9, math.nan, math.inf, True, "0.1", None])
def test_a_bad_learning_rate_is_refused(lr: object) -> None:
    error = ValueError if isinstance(lr, float) else TypeError
    with pytest.raises(error, match=r"^lr: got .*; expected a number >= 0$"):
        DualAscent(lr)  # pyright: ignore[reportArgumentType]


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="lr"):
        DualAscent().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
