"""Several constraints as one: the sum of their terms, one step, one state, and all of them held."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    AugmentedLagrangian,
    Constraints,
    DensityConstraint,
    DualAscent,
    EqualityAscent,
    L0Penalty,
    PIControl,
    prune,
)
from l0fast.layers.handle import gated_layers
from l0fast.maths.hard_concrete import HardConcrete
from tests.helpers.gated import gated_mlp

X = torch.randn(2, 8)
SHIFT = 2 / 3 * math.log(11)  # P(open) = sigmoid(log_alpha + SHIFT), from the paper's constants


def mlp(**options: Any) -> nn.Sequential:
    return gated_mlp(8, 16, 4, mean=2, **options)


def units(opened: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([p.sum() for p in opened.values()]).sum()


def four(model: nn.Module, dual: DualAscent | None = None) -> list[DensityConstraint]:
    """By gates for the model and for a layer, by MACs, and by a cost of one's own."""
    return [
        DensityConstraint(model, 0.7, dual=dual),
        DensityConstraint(model, {"0": 0.6}, dual=dual),
        DensityConstraint(model, 0.5, measure="macs", example_inputs=X, dual=dual),
        DensityConstraint(model, 0.8, measure=units, dual=dual),
    ]


def test_one_call_and_one_step_are_those_of_each() -> None:
    model = mlp(distribution=HardConcrete(bound=3.0))
    dual = DualAscent(0.5, restarts=False)
    alone, together = four(model, dual), Constraints(four(model, dual))
    for index, (one, other) in enumerate(zip(alone, together.constraints, strict=True)):
        one.multiplier.fill_(1.0 + index)
        other.multiplier.fill_(1.0 + index)  # type: ignore[operator]
    model(X)
    wanted = torch.stack([one() for one in alone]).sum()
    got = together()
    torch.testing.assert_close(got, wanted)
    gates = [layer.log_alpha for layer in gated_layers(model).values()]
    pairs = zip(torch.autograd.grad(got, gates), torch.autograd.grad(wanted, gates), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        gates[0].fill_(9.0)
    together.step()
    assert float(gates[0].detach().max()) == 3.0
    for one, other in zip(alone, together.constraints, strict=True):
        one.step()
        torch.testing.assert_close(one.multiplier, other.multiplier)
        assert float(one.multiplier) != 0


def test_prune_holds_them_all() -> None:
    model = mlp()
    _held = Constraints(four(model))
    report: Any = prune(model, X).report
    assert sorted(report.groups) == ["0", "model", "model (macs)", "model (units)"]
    for group in report.groups.values():
        assert group["density"] <= group["target"]
    assert report.macs[0] / report.macs[1] == report.groups["model (macs)"]["density"]


def test_the_state_goes_round() -> None:
    model = mlp()
    one, other = Constraints(four(model)), Constraints(four(model))
    for _ in range(3):
        one()
        one.step()
    other.load_state_dict(one.state_dict())
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), buffer)
    twin = Constraints(reversed(four(model)))
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict: got 'constraints on model \(0 2\) by g"):
        twin.load_state_dict(one.state_dict())
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(before[name], buffer)


def test_what_is_refused() -> None:
    model, other = mlp(), mlp()
    with pytest.raises(ValueError, match=r"^constraints: got \[\]; expected one or more Density"):
        Constraints([])
    with pytest.raises(TypeError, match=r"^constraints: got 'L0Penalty'; expected one or more"):
        Constraints([L0Penalty(model, 0.1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"^constraints: got 'several models'; expected constra"):
        Constraints([DensityConstraint(model, 0.5), DensityConstraint(other, 0.5)])
    with pytest.raises(ValueError, match=r"^constraints: got \"two on \('0', '2'\) by gates\"; "):
        Constraints([DensityConstraint(model, 0.5), DensityConstraint(model, 0.4)])


# --- targets that cannot hold together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("equal", "other", "most"),
    [
        # The layers' gates control 128 and 64 parameters, 2 to 1.
        (0.7, {"0": 0.4}, (2 * 0.4 + 1) / 3),
        (0.7, {"2": 0.07}, (2 + 0.07) / 3),
        ({"0": 0.5}, 0.25, 0.25 * 3 / 2),
        # Each alone would leave enough; the two targets of one constraint together do not.
        (0.6, {"0": 0.5, "2": 0.5}, 0.5),
    ],
)
def test_a_density_out_of_reach_is_refused(equal: Any, other: Any, most: float) -> None:
    model = mlp()
    one = DensityConstraint(model, equal, dual=EqualityAscent())
    two = DensityConstraint(model, other)
    for terms in ([one, two], [two, one]):
        with pytest.raises(ValueError, match=r"^constraints: density of .*; expected at most") as e:
            Constraints(terms)
        # What the other layer keeps with all its gates at the bound of log_alpha.
        least = 0.5 / (1 + math.exp(10 - SHIFT)) if equal == {"0": 0.5} else 0.0
        said = float(str(e.value).split("at most ")[1].split(",")[0])
        assert said == pytest.approx(most - least, rel=1e-5)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("equal", "other"),
    [
        (0.59, {"0": 0.4}),
        ({"0": 0.5}, 0.34),
        ({"0": 0.5}, {"2": 0.2}),
        (0.5, {"0": 0.5, "2": 0.5}),
    ],
)
def test_a_density_within_reach_is_not(equal: Any, other: Any) -> None:
    model = mlp()
    one = DensityConstraint(model, equal, dual=EqualityAscent())
    _held = Constraints([one, DensityConstraint(model, other)])


def test_targets_that_are_the_most_hold_together_whatever_they_are() -> None:
    """Costs do not fall when a gate opens: the fewest gates have the least of each."""
    model, x = mlp(), torch.randn(1, 8)
    lowest: dict[str, float] = {}
    for measure in ("gates", "params", "macs"):
        with pytest.raises(ValueError, match=r"expected a density in") as e:
            DensityConstraint(model, 1e-9, measure=measure, example_inputs=x)
        lowest[measure] = float(str(e.value).split("[")[1].split(",")[0]) * (1 + 1e-5)
    _held = Constraints(
        DensityConstraint(model, low, measure=measure, example_inputs=x)
        for measure, low in lowest.items()
    )
    report: Any = prune(model, x).report
    assert report.architecture == "1-1"


def test_duals_are_mixed() -> None:
    model = mlp()
    one = DensityConstraint(model, 0.5, dual=AugmentedLagrangian(0.3, dual_first=True))
    two = DensityConstraint(model, {"0": 0.4}, dual=PIControl(0.2))
    both = Constraints([one, two])
    both().backward()
    before = two.multiplier.clone()
    assert float(one.multiplier) > 0
    both.step()
    assert float(two.multiplier) > float(before) == 0
