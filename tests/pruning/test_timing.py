"""What is timed for a latency table: layers that shrink, at their widths, and what is beside."""

from __future__ import annotations

import importlib
import io
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, measure_latency, prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.pruning import stopwatch
from l0fast.pruning.stopwatch import quartiles, whole_seconds
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "ROUNDS", (2, 3))


class Slow(nn.Linear):
    """Not a layer of ours: what takes time besides them."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x


def test_quartiles_are_of_each_call() -> None:
    order: list[int] = []

    def call(index: int) -> Any:
        def run() -> None:
            order.append(index)
            time.sleep(0.002 * index)

        return run

    found = quartiles([lambda: [call(3)], lambda: [call(1), call(2)]], torch.device("cpu"))
    for seconds, index in zip(found, (3, 1, 2), strict=True):
        assert 0.002 * index <= seconds < 0.002 * index + 0.02
    assert order.index(2) < len(order) - order[::-1].index(3)  # interleaved


def test_models_are_timed_in_evaluation_and_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    assert all(
        seconds > 0
        for seconds in whole_seconds([model, nn.Linear(3, 3)], Example.of(torch.ones(1, 3)))
    )
    assert model.training


def test_the_widths_of_a_model() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    x = torch.randn(2, 2, 8, 8)
    gated = sparsify_(net, example_inputs=x)
    table = measure_latency(gated, x)
    sides = {name: (layer.inputs, layer.outputs) for name, layer in table.layers.items()}
    assert sides == {
        "0": ([2], [1, 2, 4, 6, 8]),  # the model's own input stays
        "1": ([8], [1, 2, 4, 6, 8]),
        "3": ([8], [2, 4, 6, 8]),  # in whole groups
        "7": ([1, 2, 4, 6, 8], [5]),  # and so does its output
    }
    for layer in table.layers.values():
        cells = torch.tensor(layer.seconds)
        assert bool((cells > 0).all())
        assert bool((cells.diff(dim=0) >= 0).all())
        assert bool((cells.diff(dim=1) >= 0).all())
    assert table.about["device"] == "cpu"
    assert table.about["shapes"] == [[2, 2, 8, 8]]
    assert table.about["threads"] == torch.get_num_threads()


def test_what_is_beside_the_layers_is_in_the_rest() -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), Slow(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(3, 6)
    gated = sparsify_(net, example_inputs=x)
    table = measure_latency(gated, x)
    assert "2" not in table.layers
    assert 0.008 < table.rest < 0.03
    assert sum(layer.seconds[-1][-1] for layer in table.layers.values()) < 0.005


def test_half_the_model_takes_less(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_size(models: list[nn.Module], _args: Any) -> list[float]:
        return [sum(p.numel() for p in model.parameters()) * 1e-9 for model in models]

    # What is measured here depends on what else the machine does.
    monkeypatch.setattr(importlib.import_module("l0fast.pruning.prune"), "whole_seconds", by_size)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
    x = torch.randn(128, 512)
    gated = sparsify_(net, example_inputs=x)
    constraint = DensityConstraint(gated, 0.5, measure="latency", example_inputs=x)
    small: Any = prune(gated, x)
    (group,) = small.report.groups.values()
    assert group["measure"] == "latency"
    assert group["density"] <= 0.5
    assert 0 < group["kept"] < group["total"]
    after, before = small.report.latency
    kept, dense = small.report.params
    assert after / before == pytest.approx(kept / dense)
    assert constraint.table is not None
    assert constraint.realised()["model"] == pytest.approx(1.0)  # float32 gates, a float64 table
    file = io.BytesIO()
    torch.save(constraint.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # as a checkpoint is
    constraint.load_state_dict(state)
    assert constraint.table.as_json() == state["_extra_state"]["latency"]


@pytest.mark.parametrize(
    "name", telling(["lenet", "mobilenet", "resnext", "gpt2", "llama", "bert"], ["lenet", "llama"])
)
def test_every_kind_of_layer_is_timed_and_held(name: str) -> None:
    torch.manual_seed(0)
    build, example = ZOO[name]
    args = example()
    model = sparsify_(build().eval(), example_inputs=args, density_init=1.0)
    table = measure_latency(model, args)
    constraint = DensityConstraint(model, 1.0, measure=table, example_inputs=args)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            shut = torch.rand(layer.log_alpha.shape) < 0.5
            shut[torch.randint(len(shut), ())] = False
            layer.log_alpha.copy_(torch.where(shut, -torch.inf, torch.inf))
    report: Any = prune(model, args).report
    (group,) = report.groups.values()
    assert float(constraint.densities().detach()) == pytest.approx(group["density"], rel=1e-5)
    assert group["density"] <= 1.0  # timed on whatever machine this is
    assert report.params[0] < report.params[1]
