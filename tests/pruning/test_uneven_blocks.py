"""Units that lie in blocks of several sizes, or in several places: a gate each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import DensityConstraint, prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.expected import expected_open
from l0fast.layers.handle import gated_layers
from l0fast.pruning.shrink import plan_removal, remove_
from tests.helpers.half_closed import assert_merged, assert_same, half_closed
from tests.helpers.thinned import thinned_product


class Grouped(nn.Module):
    """A group norm after a concat: of the groups of the first part's own norm, and of its own."""

    def __init__(self, first: int = 16, second: int = 8, groups: int = 4) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, first, 3), nn.Conv2d(3, second, 3)
        self.own = nn.GroupNorm(4, first)
        self.norm = nn.GroupNorm(groups, first + second)
        self.last, self.fc = nn.Conv2d(first + second, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.own(self.first(x)), self.second(x)], 1)
        return self.fc(self.last(self.norm(x).relu()).mean((2, 3)))


class Twice(nn.Module):
    """A tensor beside what is made of it, as in GhostNet: each unit lies at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.cheap = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.last, self.fc = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.fc(self.last(torch.cat([x, self.cheap(x)], 1)).mean((2, 3)))


class Function(nn.Module):
    """A group norm by its function, whose number of groups an attribute has, or nothing."""

    def __init__(self, written: bool, affine: bool) -> None:
        super().__init__()
        self.first, self.last, self.fc = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Linear(8, 4)
        self.parts = 4
        self.written, self.affine = written, affine
        self.weight = nn.Parameter(torch.rand(16) + 0.5)
        self.bias = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (self.weight, self.bias) if self.affine else (None, None)
        x = F.group_norm(self.first(x), 4 if self.written else self.parts, weight, bias)
        return self.fc(self.last(x.relu()).mean((2, 3)))


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


# The border of the concat lies inside a group, or between two.
@pytest.mark.parametrize("sizes", [(16, 8, 4), (16, 8, 6), (32, 16, 4)], ids=str)
def test_whole_groups_go_after_a_concat(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    model, x = Grouped(*sizes), image()
    half_closed(model, x)
    assert gated_layers(model)["last"].gates == "input"
    constraint = DensityConstraint(model, 0.7, measure="params", example_inputs=x)
    small: Any = prune(model, x, 1.0)
    assert_same(small, model, image(3))
    assert_merged(small)
    assert small.norm.num_groups < sizes[2]
    assert small.first.out_channels + small.second.out_channels == small.last.in_channels
    within: Any = prune(model, x, constraint)
    assert within.report.params[0] <= 0.7 * within.report.params[1]


def test_a_unit_at_two_places_has_one_gate() -> None:
    torch.manual_seed(0)
    model, x = Twice(), image()
    table = sparsify_(model, example_inputs=x.float(), dry_run=True)
    row = {row.name: row for row in table.layers}["last"]
    assert (row.gates, row.num_gates) == ("input", 8)
    half_closed(model, x)
    layer = gated_layers(model)["last"]
    assert layer.log_alpha.shape == (8,)
    DensityConstraint(model, 0.5, measure="params", example_inputs=x)
    small: Any = prune(model, x)
    assert_same(small, model, image(3))
    assert_merged(small)
    assert (small.first.out_channels, small.cheap.groups, small.last.in_channels) == (4, 4, 8)
    (site,) = (site for site in small.report.sites if site["name"] == "last")
    assert (site["gates_open"], site["gates_total"], site["in"]) == (4, 8, [8, 16])


def test_its_gradient_is_that_of_both_places() -> None:
    torch.manual_seed(0)
    model, x = Twice().double(), image()
    sparsify_(model, example_inputs=x)
    layer: Any = gated_layers(model)["last"]
    z = torch.rand(8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    masked = F.conv2d(y, layer.weight * layer.spread(z).view(1, -1, 1, 1), layer.bias)
    (dz,) = torch.autograd.grad(masked.square().sum(), z)
    apart = z.detach().repeat(2).requires_grad_()
    masked = F.conv2d(y, layer.weight * apart.view(1, -1, 1, 1), layer.bias)
    (both,) = torch.autograd.grad(masked.square().sum(), apart)
    torch.testing.assert_close(dz, both[:8] + both[8:])
    # And it counts for both in the density.
    layer.log_alpha.data.fill_(-20.0)
    layer.log_alpha.data[0] = 20.0
    number = float(expected_open([layer])[0].detach())
    assert number * layer.group_size == pytest.approx(2 * 8, abs=1e-3)


def test_a_unit_at_two_places_goes_during_training() -> None:
    torch.manual_seed(0)
    model, x = Twice(), image()
    half_closed(model, x)
    before = model(x).detach()
    kept = {name: layer.log_alpha > -3 for name, layer in gated_layers(model).items()}
    removal, _ = plan_removal(model, Example((x,)), kept)
    assert removal is not None
    remove_(model, removal, Example((x,)), False)
    layer: Any = gated_layers(model)["last"]
    assert layer.log_alpha.shape == (4,)
    assert layer.in_channels == 8
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("written", "affine"), thinned_product(2, [False, True], [False, True]))
def test_groups_that_a_function_normalises(written: bool, affine: bool) -> None:
    torch.manual_seed(0)
    model, x = Function(written, affine), image()
    half_closed(model, x)
    small: Any = prune(model, x)
    assert_same(small, model, image(3))
    if written:  # nothing can follow it: zeros come back in front of it
        assert small.report.tier == "merged except across reshapes"
        return
    assert_merged(small)
    assert (small.parts, small.first.out_channels) == (2, 8)
    assert small.weight.shape == ((8,) if affine else (16,))
