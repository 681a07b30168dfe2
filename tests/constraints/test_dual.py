"""The duals: their formulas, restarts, and convergence to multipliers known in closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    AugmentedLagrangian,
    DensityConstraint,
    DualAscent,
    EqualityAscent,
    L0Linear,
    PIControl,
    TargetSchedule,
)
from l0fast.constraints.dual import DUALS, Dual
from l0fast.layers.handle import gated_layers
from tests.helpers.counting import Counting
from tests.helpers.thinned import thinned, thinned_product


class Layers(nn.Module):
    """Two gated layers of different group sizes (4 and 2 weights a gate)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = L0Linear(3, 4, density_init=0.9)
        self.b = L0Linear(5, 2, density_init=0.9)


# loss(p) = sum_i stiffness_i / 2 * (free - p_i)^2 over the open probabilities p of all gates; free
# is 1 where not said otherwise.
STIFFNESS = {
    "a": torch.tensor([2.0, 2.5, 4.0], dtype=torch.float64),
    "b": torch.tensor([1.2, 1.5, 2.0, 3.0, 6.0], dtype=torch.float64),
}
GROUP_SIZE = {"a": 4, "b": 2}


def solution(
    groups: list[list[str]], targets: list[float], free: float = 1.0
) -> tuple[dict[str, Tensor], Tensor]:
    """p* and lambda* of: minimise the loss subject to sum_i share_i p_i = target, each group.

    With share_i = group size / parameters of the group, stationarity of the Lagrangian says
    stiffness_i (p_i - free) + lambda share_i = 0, so p_i = free - lambda share_i / stiffness_i; put
    into the constraint (shares add up to 1),
    lambda = (free - target) / sum_i share_i^2 / stiffness_i.
    """
    p: dict[str, Tensor] = {}
    multipliers: list[float] = []
    for names, target in zip(groups, targets, strict=True):
        total = sum(GROUP_SIZE[name] * len(STIFFNESS[name]) for name in names)
        share = {name: GROUP_SIZE[name] / total for name in names}
        spread = sum(float((share[name] ** 2 / STIFFNESS[name]).sum()) for name in names)
        multipliers.append((free - target) / spread)
        for name in names:
            p[name] = free - multipliers[-1] * share[name] / STIFFNESS[name]
    assert all(bool(((q > 0.05) & (q < 0.95)).all()) for q in p.values())  # inside the bounds
    return p, torch.tensor(multipliers, dtype=torch.float64)


def descend(
    model: nn.Module, constraint: DensityConstraint, steps: int, lr: float, free: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """Gradient descent on log_alpha, ascent on the multipliers; [(multiplier, violation)]."""
    layers = gated_layers(model)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    path: list[tuple[Tensor, Tensor]] = []
    for _ in range(steps):
        parts = [
            (STIFFNESS[name] / 2 * (free - layer.open_probability()) ** 2).sum()
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


# --- the other duals -----------------------------------------------------------------------------

CONVERGING: dict[str, Dual] = {
    "ascent": DualAscent(1.0, restarts=False),
    "ascent, dual first": DualAscent(1.0, restarts=False, dual_first=True),
    "pi": PIControl(1.0, proportional=2.0, smoothing=0.5),
    "pi, dual first": PIControl(1.0, proportional=1.0, dual_first=True),
    "augmented": AugmentedLagrangian(1.0, penalty=3.0),
    "augmented, dual first": AugmentedLagrangian(1.0, penalty=1.0, dual_first=True),
    "equality": EqualityAscent(1.0),
    "equality, dual first": EqualityAscent(1.0, dual_first=True),
}


@pytest.mark.parametrize(("name", "scheduled"), thinned_product(2, CONVERGING, [False, True]))
def test_each_converges_to_the_known_solution(name: str, scheduled: bool) -> None:
    model = Layers().double()
    schedule = TargetSchedule(100) if scheduled else None
    target, dual = {"a": 0.6, "b": 0.5}, CONVERGING[name]
    constraint = DensityConstraint(model, target, dual=dual, schedule=schedule)
    p, multipliers = solution([["a"], ["b"]], [0.6, 0.5])
    path = descend(model, constraint, 300, lr=4.0)
    torch.testing.assert_close(constraint.multiplier, multipliers, rtol=1e-8, atol=0)
    for layer, gates in gated_layers(model).items():
        torch.testing.assert_close(gates.open_probability(), p[layer], rtol=0, atol=1e-8)
    # It settles without having blown up on its way.
    highest = torch.stack([multiplier for multiplier, _ in path]).amax(0)
    assert bool((highest < 1.5 * multipliers).all())


@pytest.mark.parametrize("name", thinned(CONVERGING, 2))
def test_a_density_below_its_target(name: str) -> None:
    """The loss wants p = 0.3. At most 0.5 lets it; equal to 0.5 pushes it up, lambda* < 0."""
    model = Layers().double()
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(-2.0)  # p = 0.4
    constraint = DensityConstraint(model, 0.5, dual=CONVERGING[name])
    descend(model, constraint, 500, lr=4.0, free=0.3)
    p, multipliers = solution([["a", "b"]], [0.5], free=0.3)
    if "equality" in name:
        assert float(multipliers) < 0
        torch.testing.assert_close(constraint.multiplier, multipliers, rtol=1e-6, atol=0)
    else:
        p = {layer: torch.full_like(values, 0.3) for layer, values in p.items()}
        assert float(constraint.multiplier) == 0
    for layer, gates in gated_layers(model).items():
        torch.testing.assert_close(gates.open_probability(), p[layer], rtol=0, atol=1e-6)


def test_pi_control_by_hand() -> None:
    """kappa_i 0.1, kappa_p 2, nu 0.75; the second constraint is kept at 0."""
    multiplier, smoothed, lr = torch.zeros(2), torch.zeros(2), torch.tensor(0.1)
    rule = PIControl(0.1, proportional=2.0, smoothing=0.75)
    for violation, smooth, wanted in (
        (0.8, 0.2, 0.08 + 2 * 0.2),
        (0.4, 0.25, 0.48 + 0.04 + 2 * 0.05),
        (-0.15, 0.15, 0.62 - 0.015 - 2 * 0.1),
    ):
        rule.step_(multiplier, torch.tensor([violation, -0.5]), lr, smoothed)
        assert float(smoothed[0]) == pytest.approx(smooth)
        assert multiplier.tolist() == pytest.approx([wanted, 0])


def test_pi_control_without_a_proportional_part_is_dual_ascent() -> None:
    paths: list[list[float]] = []
    for rule in (PIControl(0.3, proportional=0.0), DualAscent(0.3, restarts=False)):
        model = Layers().double()
        constraint = DensityConstraint(model, 0.4, dual=rule)
        paths.append([float(m) for m, _ in descend(model, constraint, 50, lr=2.0)])
    assert paths[0] == paths[1]


def test_pi_control_overshoots_less() -> None:
    lowest: dict[float, float] = {}
    for proportional in (0.0, 10.0):
        model = Layers().double()
        rule = PIControl(0.5, proportional=proportional)
        constraint = DensityConstraint(model, 0.5, dual=rule)
        path = descend(model, constraint, 200, lr=0.5)
        lowest[proportional] = min(float(violation) for _, violation in path)
    assert lowest[0.0] < -0.06
    assert lowest[10.0] > -1e-3


@pytest.mark.parametrize(("multiplier", "violation"), [(0.0, 0.3), (2.0, 0.3), (2.0, -0.3)])
def test_the_augmented_term_pushes_with_the_raised_multiplier(
    multiplier: float, violation: float
) -> None:
    v = torch.tensor([violation, -5.0], requires_grad=True)
    term = AugmentedLagrangian(penalty=4.0).term(torch.tensor([multiplier, 1.0]), v)
    term.backward()
    raised = max(0.0, multiplier + 4 * violation)
    assert v.grad is not None
    assert v.grad.tolist() == pytest.approx([raised, 0.0])  # slack, the second is free
    value = (raised**2 - multiplier**2) / 8 - 1 / 8
    assert float(term.detach()) == pytest.approx(value, abs=1e-6)


def test_the_equality_form_by_hand() -> None:
    multiplier, quadratic = torch.tensor([0.5]), torch.tensor([2.0])
    violation = torch.tensor([-0.2], requires_grad=True)
    rule = EqualityAscent()
    term = rule.term(multiplier, violation, quadratic)
    assert float(term.detach()) == pytest.approx(0.5 * -0.2 + 2 * 0.04)
    term.backward()
    assert float(violation.grad) == pytest.approx(0.5 + 4 * -0.2)  # type: ignore[arg-type]
    rule.step_(multiplier, violation.detach() * 10, torch.tensor(0.5), quadratic)
    assert float(multiplier) == pytest.approx(-0.5)  # of either sign
    assert float(quadratic) == pytest.approx(4.0)


# --- what they share -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DUALS)
def test_no_multiplier_leaves_its_limit(kind: str) -> None:
    model = Layers()
    constraint = DensityConstraint(model, {"a": 0.4, "b": 0.5}, dual=DUALS[kind](1.0, limit=1.5))
    for _ in range(20):
        constraint()
        constraint.step()
    assert constraint.multiplier.tolist() == [1.5, 1.5]
    if kind == "equality":
        constraint.target.fill_(1.0)  # far above
        for _ in range(200):
            constraint()
            constraint.step()
        assert constraint.multiplier.tolist() == [-1.5, -1.5]
        assert float(constraint.get_buffer("quadratic").max()) <= 1.5


@pytest.mark.parametrize("kind", DUALS)
def test_dual_first_moves_before_the_loss_and_once_a_step(kind: str) -> None:
    lr = 0.5
    constraint = DensityConstraint(Layers(), 0.4, dual=DUALS[kind](lr, dual_first=True))
    after = DensityConstraint(Layers(), 0.4, dual=DUALS[kind](lr))
    with torch.no_grad():
        constraint()  # looking on is no step
    assert float(constraint.multiplier) == 0
    after()
    after.step()
    first = constraint().detach()
    torch.testing.assert_close(constraint.multiplier, after.multiplier)
    torch.testing.assert_close(first, after().detach())  # by the multiplier that has moved
    assert float(first) > 0
    constraint()  # a second micro-batch
    torch.testing.assert_close(constraint.multiplier, after.multiplier)
    constraint.step()  # which does not move it again
    torch.testing.assert_close(constraint.multiplier, after.multiplier)
    constraint()
    assert float(constraint.multiplier) > float(after.multiplier)


@pytest.mark.parametrize("kind", DUALS)
@pytest.mark.parametrize("dual_first", [False, True])
def test_the_state_goes_on_bit_for_bit(kind: str, dual_first: bool) -> None:
    def constrained() -> tuple[nn.Module, DensityConstraint]:
        torch.manual_seed(0)
        model = Layers()
        rule = DUALS[kind](0.7, dual_first=dual_first)
        return model, DensityConstraint(model, {"a": 0.6, "b": 0.5}, dual=rule)

    whole, first, second = constrained(), constrained(), constrained()
    descend(*whole, 30, lr=4.0)
    descend(*first, 13, lr=4.0)
    for one, other in zip(first, second, strict=True):
        other.load_state_dict(one.state_dict())
    descend(*second, 17, lr=4.0)
    for one, other in zip(whole, second, strict=True):
        for name, value in one.state_dict().items():
            if name != "_extra_state":
                torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0)


def test_the_state_of_another_dual_is_refused() -> None:
    one = DensityConstraint(Layers(), 0.5, dual=PIControl(0.1))
    other = DensityConstraint(Layers(), 0.5)
    with pytest.raises(ValueError, match=r"^state_dict: .* moved by PIControl'; .* by DualAscent$"):
        other.load_state_dict(one.state_dict())
    # States of before there was a choice name none.
    state = DensityConstraint(Layers(), 0.5).state_dict()
    del state["_extra_state"]["dual"], state["_extra_state"]["scheduled"]
    other.load_state_dict(state)


@pytest.mark.parametrize("kind", DUALS)
@pytest.mark.parametrize("dual_first", [False, True])
def test_no_host_sync(kind: str, dual_first: bool) -> None:
    model = Layers()
    constraint = DensityConstraint(model, 0.5, dual=DUALS[kind](0.1, dual_first=dual_first))
    model.to("meta")
    for _ in range(2):
        constraint().backward()
        constraint.step()  # a read by the host has no value to give here


def test_what_the_default_costs() -> None:
    """Operations beside the counts; the room for other duals takes none."""
    model = Layers()
    constraint = DensityConstraint(model, 0.5)
    counted = constraint._open_counts()
    constraint._open_counts = lambda: counted
    with Counting() as counting:
        constraint()
        constraint.ascend_()
    wanted = {"sub": 1, "detach": 1, "dot": 2, "view": 2, "lt": 1, "sign": 1, "addcmul_": 2}
    wanted |= {"masked_fill_": 1}
    assert counting.calls == wanted


ONE: Any = "1"


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DualAscent(limit=0.0), ValueError, "limit: got 0.0; expected a number > 0"),
        (lambda: DualAscent(limit=math.nan), ValueError, "limit: got nan; expected a number > 0"),
        (lambda: PIControl(limit=ONE), TypeError, "limit: got '1'; expected a number > 0"),
        (
            lambda: DualAscent(dual_first=ONE),
            TypeError,
            "dual_first: got '1'; expected True or False",
        ),
        (
            lambda: PIControl(proportional=-1.0),
            ValueError,
            "proportional: got -1.0; expected a number >= 0",
        ),
        (
            lambda: PIControl(smoothing=1.0),
            ValueError,
            "smoothing: got 1.0; expected a number in [0, 1)",
        ),
        (
            lambda: AugmentedLagrangian(penalty=0.0),
            ValueError,
            "penalty: got 0.0; expected a number > 0",
        ),
        (lambda: EqualityAscent(-1.0), ValueError, "lr: got -1.0; expected a number >= 0"),
    ],
)
def test_bad_duals(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == message
