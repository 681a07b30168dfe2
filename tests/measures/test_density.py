"""Densities: the table, parameters and MACs, and the groups that a target names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l0fast.gating.sparsify import sparsify_
from l0fast.layers.handle import gates
from l0fast.measures.density import density
from l0fast.measures.flops import count_macs, count_params
from l0fast.measures.groups import Group, gated_parameters, target_groups
from l0fast.pruning.prune import prune
from l0fast.training.models import lenet5, mlp
from tests.helpers.gated import gated
from tests.helpers.plain_models import Net

SIGMOID_OF_SHIFT = 0.8318  # P(open) at log_alpha = 0


def test_the_table() -> None:
    model = gated()
    with torch.no_grad():
        model.conv.log_alpha.copy_(torch.tensor([-1e4, -1e4, -1e4, 1e4]))
        model.fc1.log_alpha.copy_(torch.tensor([1e4] * 9 + [-1e4] * 27))
        model.fc2.log_alpha.zero_()
    table = density(model, torch.randn(2, 2, 5, 5))
    rows = [
        (row.name, row.gates, row.open_gates, row.num_gates, row.params, row.macs)
        for row in (*table.layers, table.total)
    ]
    assert rows == [
        ("conv", "output", 1, 4, 4 * 19, 2 * 9 * 4 * 18),
        ("fc1", "input", 9, 36, 36 * 6, 2 * 36 * 6),
        ("fc2", "weight", 18, 18, 18, 2 * 18),
        ("total", "", 28, 58, 76 + 216 + 18, 2 * (9 * 4 * 18 + 36 * 6 + 18)),
    ]
    expected = [0.25, 0.25, SIGMOID_OF_SHIFT]
    assert [row.expected for row in table.layers] == pytest.approx(expected, abs=1e-4)
    assert [row.realised for row in table.layers] == [0.25, 0.25, 1.0]
    # In all, weighted by parameters, not by gates.
    assert table.total.expected == pytest.approx((19 + 54 + 18 * SIGMOID_OF_SHIFT) / 310, abs=1e-5)
    assert table.total.realised == pytest.approx((19 + 54 + 18) / 310)
    assert model.training


def test_the_table_prints_aligned_with_a_total() -> None:
    lines = str(density(gated(density_init=0.25))).splitlines()
    assert " ".join(lines[0].split()) == "layer gates open of expected realised params MACs"
    assert lines[1].split() == ["conv", "output", "0", "4", "0.2500", "0.0000", "76", "-"]
    assert lines[-1].split() == ["total", "0", "58", "0.2500", "0.0000", "310", "-"]
    assert len(lines) == 5
    assert len({len(line) for line in lines}) == 1
    with_macs = str(density(gated(), torch.randn(1, 2, 5, 5)))
    assert "216" in with_macs
    assert " -" not in with_macs


def test_expected_density_is_the_mean_of_realised_draws() -> None:
    model = gated(density_init=0.37)
    layers = list(gates(model).layers.values())
    open_parameters = 0
    for layer in layers:
        noise = torch.logit(torch.rand(1000, *layer.log_alpha.shape), eps=1e-6)
        z = layer.distribution.gate(layer.log_alpha, noise)
        open_parameters += layer.group_size * int((z > 0).sum())
    mean = open_parameters / 1000 / gated_parameters(layers)
    variance = 0.37 * 0.63 * sum(layer.num_gates * layer.group_size**2 for layer in layers)
    assert mean == pytest.approx(0.37, abs=4 * (variance / 1000) ** 0.5 / 310)


def test_the_published_architectures_count_as_published() -> None:
    small = sparsify_(mlp(784, 10))
    assert count_params(small) == 266_610
    assert gated_parameters(list(gates(small).layers.values())) == 266_200  # no biases
    assert count_macs(small, torch.randn(1, 1, 28, 28))[""] == 266_200
    lenet = sparsify_(lenet5((1, 28, 28), 10))
    assert count_params(lenet) == 431_080
    assert gated_parameters(list(gates(lenet).layers.values())) == 520 + 25_050 + 400_000 + 5_000
    assert count_macs(lenet, torch.randn(1, 1, 28, 28)) == {
        **dict.fromkeys(("relu1", "pool1", "relu2", "pool2", "flatten", "relu3"), 0),
        "": 2_293_000,
        "conv1": 20 * 25 * 576,
        "conv2": 50 * 20 * 25 * 64,
        "fc1": 400_000,
        "fc2": 5_000,
    }


def test_macs_follow_the_example_and_leave_the_model_as_it_was() -> None:
    model = Net()
    model.fc1.eval()
    x = torch.randn(3, 2, 5, 5)
    one, three = count_macs(model, x[:1]), count_macs(model, (x, 2.0))
    assert {name: 3 * macs for name, macs in one.items()} == three
    assert (model.training, model.fc1.training, model.fc2.training) == (True, False, True)
    assert count_macs(nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5)) == {"": 9 * 9 * 4 * 2}
    with pytest.raises(ValueError, match=r"example_inputs: .*conv2d"):
        count_macs(model, torch.randn(3, 1))
    assert (model.training, model.fc1.training) == (True, False)


def test_attention_counts_however_pytorch_fuses_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    macs = count_macs(layer, torch.randn(3, 5, 8))
    tokens = 3 * 5
    projections, attention = tokens * 4 * 8 * 8, 2 * tokens * 5 * 8
    assert macs["self_attn"] == projections + attention
    assert macs["linear1"] == macs["linear2"] == tokens * 8 * 16
    assert macs[""] == projections + attention + 2 * tokens * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled()


class Token(nn.Module):
    """Gives a view of its parameter: a token for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.token.expand(len(x), -1, -1)


class WithToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = Token()
        self.rows = nn.Flatten(0, 1)
        self.layer = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.rows(torch.cat([self.token(x), x], 1)))


def test_a_module_that_gives_a_view_of_its_parameter_is_counted() -> None:
    model, x = WithToken(), torch.randn(3, 1, 4, requires_grad=True)
    model.layer.bias.requires_grad_(False)
    assert count_macs(model, x) == {"": 180, "token": 0, "rows": 0, "layer": 180}
    assert count_macs(nn.Sequential(nn.Flatten(0), nn.Linear(12, 1)), x)[""] == 12
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"token.token", "layer.weight"}
    assert x.requires_grad
    small: Any = prune(sparsify_(model, gates="output"), x)
    assert small.report.macs == [180, 180]


def test_shared_tensors_and_layers_count_once_as_parameters_and_each_call_as_macs() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model = nn.Sequential(shared, nn.Linear(4, 4, bias=False), shared)
    model[1].weight = shared.weight  # type: ignore[assignment]
    assert count_params(model) == 16
    sparsify_(model)
    assert count_params(model) == 16
    assert count_macs(model, torch.randn(1, 4)) == {"": 48, "0": 32, "1": 16}
    assert density(model, torch.randn(1, 4)).total.macs == 48


def test_target_groups() -> None:
    layers = gates(gated()).layers
    everything = ("conv", "fc1", "fc2")
    assert target_groups(layers, 0.5) == {"model": (Group(everything), 0.5)}
    assert target_groups(layers, 1) == {"model": (Group(everything), 1.0)}
    assert target_groups(layers, {"fc*": 0.3, "conv": 0.5}) == {
        "fc*": (Group(("fc1", "fc2")), 0.3),
        "conv": (Group(("conv",)), 0.5),
    }
    assert target_groups(layers, {"*": 0.5}) == {"*": (Group(everything), 0.5)}
    # With a number it is the whole model that is measured, and what has no gates with it.
    assert target_groups(layers, 0.5, "macs") == {"model": (Group(everything, "macs", ""), 0.5)}
    assert target_groups(layers, {"*": 0.5}, "macs") == {"*": (Group(everything, "macs"), 0.5)}


BAD_TARGETS: list[tuple[Any, str]] = [
    (0, r"target: got 0; expected a density in \(0, 1\]"),
    (1.5, r"target: got 1.5; expected a density in \(0, 1\]"),
    (float("nan"), r"target: got nan; expected a density in \(0, 1\]"),
    ({}, r"target: got \{\}; expected at least one layer or pattern"),
    ({"fc9": 0.5}, r"target: got 'fc9'; expected a pattern that matches one of \['conv', 'fc1'"),
    ({"fc*": 0.5, "fc1": 0.4}, r"target: got 'fc1'; expected layers of one group only \('fc1'"),
    ({"conv": 0.5, "fc1": 2}, r"target\['fc1'\]: got 2; expected a density in \(0, 1\]"),
]


@pytest.mark.parametrize(("target", "line"), BAD_TARGETS)
def test_targets_that_name_nothing_reachable_are_refused(target: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        target_groups(gates(gated()).layers, target)


@pytest.mark.parametrize("target", [None, True, {"conv": None}, {1: 0.5}, torch.tensor(0.5)])
def test_targets_of_a_wrong_type_are_refused(target: Any) -> None:
    with pytest.raises(TypeError, match=r"target.*: got .*; expected "):
        target_groups(gates(gated()).layers, target)
