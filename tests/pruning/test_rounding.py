"""Widths in multiples: blocks of the likeliest gates, within the targets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tests.helpers.plain_models as plain
from l0fast import prune, sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.measures.groups import Group
from l0fast.measures.measure import GateMeasure
from l0fast.pruning.choose import Budget, choose
from l0fast.training import models

X = torch.randn(3, 40, dtype=torch.float64)


def mlp() -> Any:
    """40-36-20-5, with gates of every kind."""
    model = sparsify_(models.mlp(40, 5, (36, 20)).double())
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.normal_(0, 2)
    return model.eval()


def kept_inputs(small: Any) -> list[int]:
    return [row["in"][0] for row in small.report.sites]


def test_without_a_target_blocks_are_filled_and_nothing_computed_changes() -> None:
    model = mlp()
    plain_small, small = prune(model, X), prune(model, X, round_to=8)
    widths = [-(-width // 8) * 8 for width in kept_inputs(plain_small)]
    assert widths != kept_inputs(plain_small)
    assert kept_inputs(small) == [min(a, b) for a, b in zip(widths, (40, 36, 20), strict=True)]
    torch.testing.assert_close(small(X), plain_small(X), rtol=1e-12, atol=1e-13)
    report: Any = small.report
    assert report.round_to == 8
    assert report.forced == 0
    assert report.filled == sum(kept_inputs(small)) - sum(kept_inputs(plain_small)) > 0
    line = f"widths in multiples of 8 ({report.filled} gates filled up)"
    assert line in str(report).splitlines()
    assert "multiples" not in str(prune(model, X).report)  # type: ignore[arg-type]


@pytest.mark.parametrize("measure", ["gates", "params", "macs"])
def test_the_target_holds_and_a_block_that_does_not_fit_is_dropped(measure: str) -> None:
    model = mlp()
    small: Any = prune(model, X, 0.35, measure=measure, round_to=4)
    assert all(width % 4 == 0 for width in kept_inputs(small))
    (group,) = small.report.groups.values()
    assert 0.2 < group["density"] <= 0.35
    assert small.report.forced > 0
    if measure != "gates":
        kept, dense = getattr(small.report, measure)
        assert kept / dense == group["density"]


def test_widths_that_are_no_multiples_are_named() -> None:
    """A channel is read at 16 positions, each with a gate of its own."""
    model: Any = sparsify_(plain.small_lenet().double()).eval()
    with torch.no_grad():
        model.fc1.log_alpha.fill_(-5.0)
        model.fc1.log_alpha[:48] = 5.0  # three channels of ten are read
    small: Any = prune(model, torch.randn(2, 1, 28, 28).double(), round_to=4)
    assert small.conv2.weight.shape[0] == 3
    assert "but conv2 out 3" in str(small.report)


@settings(max_examples=60)
@given(st.data())
def test_blocks_are_the_likeliest_and_are_used(data: st.DataObject) -> None:
    widths = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=4))
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    layers = gated_layers(sparsify_(model, gates=data.draw(st.sampled_from(["input", "output"]))))
    size = data.draw(st.integers(1, 8))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    with torch.no_grad():
        for layer in layers.values():
            layer.log_alpha.normal_(data.draw(st.integers(-2, 3)), 2.0)
    measure = GateMeasure(layers, [Group(tuple(layers))])
    least = sum(min(size, one.num_gates) * one.group_size for one in layers.values())
    target = data.draw(st.floats(least / measure.totals[0], 1.0))
    budget = Budget("all", tuple(layers), target, measure)
    kept = choose(layers, [budget], size)
    assert budget.share(kept) <= target
    for name, layer in layers.items():
        count = int(kept[name].sum())
        assert count == layer.num_gates or count % size == 0
        order = layer.log_alpha.detach().argsort(descending=True)
        assert bool(kept[name][order[:count]].all())
        is_open = layer.evaluation_gates()[order] > 0
        assert count <= max(size, -(-int(is_open.sum()) // size) * size)  # no block of closed ones
        if count < int(is_open.sum()):  # the next block did not fit
            more = min(size, layer.num_gates - count) * layer.group_size
            assert (budget.measure.spent(kept)[0] + more) / measure.totals[0] > target


def test_single_weights_are_not_rounded() -> None:
    model: Any = sparsify_(nn.Sequential(nn.Linear(5, 3)), gates="weight")
    with torch.no_grad():
        model[0].log_alpha.fill_(-5.0)
        model[0].log_alpha[1, 2] = 5.0
    assert int(choose(gated_layers(model), [], 8)["0"].sum()) == 1


def test_refusals() -> None:
    model = mlp()
    with pytest.raises(ValueError, match=r"^round_to: got 0; expected a whole number >= 1$"):
        prune(model, X, round_to=0)
    with pytest.raises(TypeError, match=r"^round_to: got '8'; expected a whole number >= 1$"):
        prune(model, X, round_to="8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^target: got 0.1; .* for 8 units in each of \('fc1', "):
        prune(model, X, 0.1, round_to=8)
