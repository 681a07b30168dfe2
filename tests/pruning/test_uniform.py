"""Layers that repeat keep as many units each, so that one number says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l0fast import DensityConstraint, gates, prune, sparsify_
from l0fast.pruning.blocks import Blocks, repeating
from tests.helpers.rms_models import Language, tokens
from tests.helpers.thinned import telling

pytestmark = pytest.mark.usefixtures("one_thread")


def gated(**options: Any) -> Any:
    model: Any = sparsify_(Language(blocks=2), example_inputs=tokens(), **options)
    with torch.no_grad():
        for name, layer in gates(model).layers.items():
            open_gates = 3 if name == "blocks.0.down" else 7
            layer.log_alpha.copy_(torch.linspace(2.0, 1.0, layer.log_alpha.numel()))
            layer.log_alpha[open_gates:] = -6.0
    return model.eval()


def widths(small: Any) -> list[int]:
    return [block.down.in_features for block in small.blocks]


def test_layers_that_repeat_are_found_by_their_names() -> None:
    names = repeating(gates(gated()).layers)
    assert names == [["blocks.0.out", "blocks.1.out"], ["blocks.0.down", "blocks.1.down"]]


def test_they_keep_as_many_units_each() -> None:
    model, x = gated(), tokens()
    assert widths(prune(model, x)) == [3, 7]
    small: Any = prune(model, x, uniform=True)
    assert widths(small) == [7, 7]
    assert small.report.filled == 4  # units of zeros
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", telling([0.9, 0.8], [0.8]))
def test_within_the_target_each_keeps_its_likeliest(target: float) -> None:
    model, x = gated(), tokens()
    with torch.no_grad():  # in another order, which shall not matter
        layer = gates(model).layers["blocks.1.down"]
        layer.log_alpha.copy_(layer.log_alpha.flip(0))
    small: Any = prune(model, x, target, measure="params", uniform=True)
    assert small.report.params[0] / small.report.params[1] <= target
    left = widths(small)[0]
    assert widths(small) == [left, left]
    kept = {row["name"]: row["outputs"] for row in small.report.layers}
    assert kept["blocks.0.up"] == list(range(left))
    assert kept["blocks.1.up"] == list(range(10 - left, 10))


def test_blocks_in_step_have_the_mean_of_their_scores() -> None:
    layers = gates(gated()).layers
    alone = Blocks.of(layers, 1, ())
    both = alone.in_step(layers, 1)
    first, second = (alone.starts[f"blocks.{number}.down"] for number in range(2))
    for rank in range(10):
        assert both.leader[first + rank] == both.leader[second + rank] == first + rank
        mean = (alone.score[first + rank] + alone.score[second + rank]) / 2
        assert both.score[first + rank] == mean


def test_gates_settle_in_step() -> None:
    model, x = gated(uniform=True), tokens()
    term = DensityConstraint(model, 0.85, measure="params", example_inputs=x)
    term.settle()
    down = [
        gates(model).layers[f"blocks.{number}.down"].evaluation_gates() > 0 for number in range(2)
    ]
    left = widths(prune(model, x))
    assert left[0] == left[1] == int(down[0].sum()) == int(down[1].sum()) > 3
    free = gated()
    DensityConstraint(free, 0.85, measure="params", example_inputs=x).settle()
    assert widths(prune(free, x))[0] != widths(prune(free, x))[1]


def test_uniform_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="uniform: got 'yes'; expected True, False or None"):
        prune(gated(), tokens(), uniform="yes")  # type: ignore[arg-type]
