"""Target schedules: the formula, the constraint under one, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from l0fast import DensityConstraint, DualAscent, L0Linear, TargetSchedule, prune
from l0fast.layers.handle import gated_layers


def model() -> nn.Sequential:
    """10-6-4 with every gate open with probability 0.8."""
    return nn.Sequential(
        L0Linear(10, 6, density_init=0.8), nn.ReLU(), L0Linear(6, 4, density_init=0.8)
    )


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("linear", [0.8, 0.65, 0.5, 0.35, 0.2, 0.2, 0.2]),
        ("cubic", [0.8, 0.2 + 0.6 * 0.75**3, 0.2 + 0.6 / 8, 0.2 + 0.6 / 64, 0.2, 0.2, 0.2]),
    ],
)
def test_the_target_comes_down(shape: str, wanted: list[float]) -> None:
    constraint = DensityConstraint(model(), 0.2, schedule=TargetSchedule(4, shape))
    aims: list[float] = []
    for _ in wanted:
        constraint()
        aims.append(float(constraint.current_target))
        assert float(constraint.violation) == pytest.approx(0.8 - aims[-1], abs=1e-6)
        constraint.step()
    assert aims == pytest.approx(wanted, abs=1e-6)
    assert aims[-1] == float(constraint.target)  # not a rounding beside it


def test_each_constraint_starts_where_it_is() -> None:
    net = model()
    with torch.no_grad():
        gated_layers(net)["2"].log_alpha.fill_(-1.5)
    start = DensityConstraint(net, {"0": 0.5, "2": 0.5}).densities().tolist()
    constraint = DensityConstraint(net, {"0": 0.3, "2": 0.9}, schedule=TargetSchedule(2, "linear"))
    # One that starts below its target may stay: the target in force is never under what is asked.
    assert constraint.current_target.tolist() == pytest.approx([start[0], 0.9])
    constraint()
    constraint.step()
    assert constraint.current_target.tolist() == pytest.approx([(start[0] + 0.3) / 2, 0.9])


def test_a_named_start() -> None:
    constraint = DensityConstraint(model(), 0.2, schedule=TargetSchedule(2, "linear", start=0.6))
    assert float(constraint.current_target) == pytest.approx(0.6)


def test_several_calls_are_one_step() -> None:
    constraint = DensityConstraint(model(), 0.2, schedule=TargetSchedule(4, "linear"))
    for _ in range(3):
        constraint()
    constraint.step()
    assert float(constraint.current_target) == pytest.approx(0.65)


def test_prune_holds_the_last_target_from_the_start() -> None:
    net = model()
    _held = DensityConstraint(net, 0.4, schedule=TargetSchedule(1000))
    report: Any = prune(net, torch.randn(1, 10)).report
    assert report.groups["model"]["target"] == 0.4
    assert report.density <= 0.4


def test_the_state_goes_on_where_it_was() -> None:
    whole, first = (
        DensityConstraint(model(), 0.2, dual=DualAscent(0.1), schedule=TargetSchedule(10))
        for _ in range(2)
    )
    for _ in range(7):
        whole()
        whole.step()
    for _ in range(3):
        first()
        first.step()
    net = model()
    with torch.no_grad():
        for layer in gated_layers(net).values():
            layer.log_alpha.sub_(3.0)
    second = DensityConstraint(net, 0.2, dual=DualAscent(0.1), schedule=TargetSchedule(10))
    assert float(second.start) != float(first.start)
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        for layer in gated_layers(net).values():
            layer.log_alpha.copy_(gated_layers(model())["0"].log_alpha[0])
    for _ in range(4):
        second()
        second.step()
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(second.get_buffer(name), buffer, rtol=0, atol=0)


def test_the_state_of_another_schedule_is_refused() -> None:
    with_one = DensityConstraint(model(), 0.2, schedule=TargetSchedule(10))
    without = DensityConstraint(model(), 0.2)
    with pytest.raises(ValueError, match=r"^state_dict: got .* with a schedule'; expected"):
        without.load_state_dict(with_one.state_dict())


def test_no_host_sync() -> None:
    net = model()
    constraint = DensityConstraint(net, 0.2, schedule=TargetSchedule(10))
    net.to("meta")
    constraint()
    constraint.step()  # a read by the host has no value to give here


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "steps: got 0; expected a whole number >= 1"),
        ((1.5,), ValueError, "steps: got 1.5; expected a whole number >= 1"),
        (("10",), TypeError, "steps: got '10'; expected a whole number >= 1"),
        ((10, "square"), ValueError, "shape: got 'square'; expected one of 'linear', 'cubic'"),
        ((10, "cubic", 0.0), ValueError, "start: got 0.0; expected a density in (0, 1]"),
        ((10, "cubic", math.nan), ValueError, "start: got nan; expected a density in (0, 1]"),
    ],
)
def test_bad_schedules(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        TargetSchedule(*arguments)
    assert str(caught.value) == message
