"""Measures: what groups of gates cost, what the gates can reach, and costs of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, HardConcrete, prune, sparsify_
from l0fast.layers import handle
from l0fast.layers.handle import gated_layers
from l0fast.measures.groups import Group
from l0fast.measures.measure import GateMeasure
from l0fast.training.models import mlp
from tests.helpers.gated import gated

EVERYTHING = ("conv", "fc1", "fc2")


# --- the gates -----------------------------------------------------------------------------------


def test_gates_are_weighted_by_their_parameters() -> None:
    layers = handle.gates(gated(density_init=0.6)).layers
    groups = [Group(("conv",)), Group(("fc1", "fc2")), Group(EVERYTHING)]
    measure = GateMeasure(layers, groups).float()
    with torch.no_grad():
        for layer in layers.values():
            layer.log_alpha.normal_()
    p = {name: layer.open_probability() for name, layer in layers.items()}
    conv, fc1, fc2 = 19 * p["conv"].sum(), 6 * p["fc1"].sum(), p["fc2"].sum()
    expected = torch.stack([conv / 76, (fc1 + fc2) / 234, (conv + fc1 + fc2) / 310])
    got = measure()
    torch.testing.assert_close(got, expected)
    gates = [layer.log_alpha for layer in layers.values()]
    mix = torch.tensor([1.0, 2.0, 3.0])
    wanted = torch.autograd.grad(expected @ mix, gates)
    for one, other in zip(torch.autograd.grad(got @ mix, gates), wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_what_gates_spend_is_exact() -> None:
    layers = handle.gates(gated()).layers
    measure = GateMeasure(layers, [Group(EVERYTHING), Group(("fc1",))])
    assert measure.totals == [310, 216]
    kept = {n: torch.zeros(layer.log_alpha.shape, dtype=torch.bool) for n, layer in layers.items()}
    kept["conv"][2] = kept["fc1"][3] = kept["fc1"][30] = kept["fc2"][1, 2] = True
    assert measure.spent(kept) == [19 + 12 + 1, 12]


def test_the_lowest_is_a_unit_in_each_layer_or_the_bound() -> None:
    layers = handle.gates(gated()).layers
    conv, every = GateMeasure(layers, [Group(("conv",)), Group(EVERYTHING)]).lowest()
    assert conv == 1 / 4
    assert every == (19 + 6) / 310  # single weights may all go
    DensityConstraint(gated(), {"conv": 0.25})
    line = r"target\['conv'\]: got 0.24; expected a density in \[0.25, 1\]"
    with pytest.raises(ValueError, match=line):
        DensityConstraint(gated(), {"conv": 0.24})
    # A narrow bound on log_alpha is a floor of its own: published code never went below 4.71 %.
    narrow = sparsify_(mlp(784, 10), distribution=HardConcrete(bound=4.60517))
    with pytest.raises(ValueError, match=r"expected a density in \[0.0471\d*, 1\]"):
        DensityConstraint(narrow, 0.04)


# --- a cost of one's own -------------------------------------------------------------------------


def latency(opened: Mapping[str, Tensor]) -> Tensor:
    """Steps of 4 units, smoothed away: 1 a layer, and 1 for each 4 units."""
    return torch.stack([1 + p.sum() / 4 for p in opened.values()]).sum()


def two_layers() -> Any:
    """8-6-4 with gates on 8 and 6 inputs."""
    return sparsify_(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))


def test_a_cost_of_ones_own_over_that_with_all_gates_open() -> None:
    model = two_layers()
    constraint = DensityConstraint(model, 0.6, measure=latency)
    assert constraint.measure == "latency"
    constraint.multiplier.fill_(2.0)
    p = [layer.open_probability().detach() for layer in gated_layers(model).values()]
    share = (2 + (p[0].sum() + p[1].sum()) / 4) / (2 + 14 / 4)
    value = constraint()
    torch.testing.assert_close(value.detach(), 2 * (share - 0.6))
    value.backward()
    assert all(layer.log_alpha.grad.abs().min() > 0 for layer in gated_layers(model).values())


def test_prune_holds_a_cost_of_ones_own() -> None:
    model = two_layers()
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.copy_(torch.arange(1.0, 1 + len(layer.log_alpha)))
    _held = DensityConstraint(model, 0.7, measure=latency)
    report: Any = prune(model, torch.randn(1, 8)).report
    # (2 + units / 4) / 5.5 <= 0.7 for at most 7 of 14 units: the 8 and 6 likeliest are closed last.
    assert report.architecture == "5-2"
    group = report.groups["model (latency)"]
    assert group["measure"] == "latency"
    assert group["kept"] == 3.75
    assert group["total"] == 5.5
    assert group["density"] == 3.75 / 5.5
    named: Any = prune(two_layers(), torch.randn(1, 8), 0.7, measure=latency).report
    assert named.groups["model"]["kept"] == 3.75


def test_a_cost_of_a_part_is_given_the_parts_own_names() -> None:
    inner = two_layers()
    seen: list[list[str]] = []

    def cost(opened: Mapping[str, Tensor]) -> Tensor:
        seen.append(list(opened))
        return opened["2"].sum()

    _held = DensityConstraint(inner, 0.5, measure=cost)
    report: Any = prune(nn.Sequential(nn.Identity(), inner), torch.randn(1, 8)).report
    assert set(map(tuple, seen)) == {("0", "2")}
    assert report.groups["1 (cost)"]["kept"] == 3


@pytest.mark.parametrize(
    ("cost", "target", "error", "message"),
    [
        (lambda p: p["0"], 0.5, TypeError, r"<lambda>(open): got (8,); expected a 0-d tensor"),
        (lambda p: 3.0, 0.5, TypeError, "<lambda>(open): got 'float'; expected a 0-d tensor"),
        (
            lambda p: 0 * p["0"].sum(),
            0.5,
            ValueError,
            "<lambda>(open): got 0.0; expected a finite cost > 0 with every gate open",
        ),
        (latency, 0.4, ValueError, "target: got 0.4; expected a density in [0.454545, 1]"),
        (latency, {"0": 0.5}, TypeError, "target: got {'0': 0.5}; expected one number, for a cost"),
    ],
)
def test_costs_that_are_refused(
    cost: Any, target: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        DensityConstraint(two_layers(), target, measure=cost)
    assert str(caught.value).startswith(message)


def test_a_measure_without_a_target_is_refused_by_prune() -> None:
    with pytest.raises(ValueError, match=r"^measure: got 'macs'; expected a target beside it$"):
        prune(two_layers(), torch.randn(1, 8), measure="macs")
