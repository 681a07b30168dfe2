"""The models of the command: the published sizes, and the published gates and initialisation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from l0fast import DensityConstraint, TrainerSettings, density, models, sparsify_
from l0fast.density import count_macs, count_params
from l0fast.draw import gated_layers

SHIFT = 2 / 3 * math.log(11)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def sizes(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]


@pytest.mark.parametrize(
    ("name", "in_shape", "widths", "weights", "params", "macs"),
    [
        ("mlp", (1, 28, 28), None, [(300, 784), (100, 300), (10, 100)], 266_610, 266_200),
        (
            "lenet5",
            (1, 28, 28),
            None,
            [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)],
            431_080,
            24 * 24 * 500 + 8 * 8 * 25_000 + 405_000,
        ),
        ("mlp", (1, 8, 8), (16,), [(16, 64), (10, 16)], 1_210, 1_184),
        ("mlp", (1, 2, 2), (5, 4, 3, 2), [(5, 4), (4, 5), (3, 4), (2, 3), (10, 2)], 102, 78),
        (
            "lenet5",
            (1, 8, 8),
            (3, 4, 5),
            [(3, 1, 3, 3), (4, 3, 3, 3), (5, 16), (10, 5)],
            287,
            64 * 27 + 16 * 108 + 80 + 50,
        ),
    ],
)
def test_sizes(
    name: str, in_shape: Any, widths: Any, weights: list[Any], params: int, macs: int
) -> None:
    model = models.build(name, in_shape, 10, widths)
    assert sizes(model) == weights
    assert count_params(model) == params
    assert count_macs(model, torch.zeros(1, *in_shape))[""] == macs
    assert model(torch.randn(7, *in_shape)).shape == (7, 10)
    assert not torch.equal(model(torch.randn(1, *in_shape)), model(torch.randn(1, *in_shape)))


def test_gates_stand_where_the_papers_have_them() -> None:
    mlp = sparsify_(models.build("mlp", (1, 28, 28), 10))
    assert density(mlp).total.params == 266_200
    where = {name: (g.gates, g.num_gates) for name, g in gated_layers(mlp).items()}
    assert where == {"fc1": ("input", 784), "fc2": ("input", 300), "fc3": ("input", 100)}
    lenet = sparsify_(models.build("lenet5", (1, 28, 28), 10))
    where = {name: (g.gates, g.num_gates) for name, g in gated_layers(lenet).items()}
    assert where == {
        "conv1": ("output", 20),
        "conv2": ("output", 50),
        "fc1": ("input", 800),
        "fc2": ("input", 500),
    }
    # A convolution's bias is gated with its filter, a Linear's is not.
    assert density(lenet).total.params == 20 * 26 + 50 * 501 + 800 * 500 + 500 * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vgg", (1, 8, 8), 10), "model: got 'vgg'; expected one of 'mlp', 'lenet5'"),
        (("mlp", (1, 8, 8), 10, (0,)), "widths: got (0,); expected whole numbers >= 1"),
        (("mlp", (1, 8, 8), 10, (30, -5)), "widths: got (30, -5); expected whole numbers >= 1"),
        (("mlp", (1, 8, 8), 10, (30.5,)), "widths: got (30.5,); expected whole numbers >= 1"),
        (("lenet5", (1, 8, 8), 10, (3, 4)), "widths: got (3, 4); expected three numbers for lenet"),
        (("lenet5", (1, 8, 3), 10), "in_shape: got (1, 8, 3); expected images of at least 4x4"),
    ],
)
def test_bad_arguments(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        models.build(*arguments)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["mlp", "lenet5"])
def test_the_published_start(name: str) -> None:
    """log_alpha ~ N(log((1 - d) / d), 0.01), within log(100); He-normal weights / (1 - d)."""
    model = models.sparsify_published_(models.build(name, (1, 28, 28), 10))
    params: dict[str, int] = {}
    start: dict[str, float] = {}
    for layer_name, layer in gated_layers(model).items():
        droprate = 0.2 if layer_name == "fc1" and name == "mlp" else 0.5
        mean = math.log((1 - droprate) / droprate)
        n = layer.num_gates
        assert float(layer.log_alpha.detach().mean()) == pytest.approx(mean, abs=0.05 / n**0.5)
        assert float(layer.log_alpha.detach().std()) == pytest.approx(0.01, rel=4 / (2 * n) ** 0.5)
        assert layer.distribution.bound == math.log(100)
        fan = layer.weight.shape[0] if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        std = math.sqrt(2 / fan) / (1 - droprate)
        count = layer.weight.numel()
        measured = float(layer.weight.detach().std())
        assert measured == pytest.approx(std, rel=4 / (2 * count) ** 0.5)
        assert not bool(layer.bias.any())
        params[layer_name] = n * layer.group_size
        start[layer_name] = sigmoid(mean + SHIFT)
    expected = sum(params[k] * start[k] for k in params) / sum(params.values())
    assert density(model).total.expected == pytest.approx(expected, abs=1e-4)
    # "Droprate 0.5" is no density: the models start at 0.938 and 0.832.
    assert expected == pytest.approx({"mlp": 0.9379, "lenet5": 0.8318}[name], abs=5e-5)


def test_the_published_bound_refuses_what_the_published_code_never_met() -> None:
    model = models.sparsify_published_(models.build("mlp", (1, 28, 28), 10))
    with pytest.raises(ValueError, match=r"got 0\.047; expected a density in \[0\.0471298"):
        DensityConstraint(model, 0.047)


def test_the_published_settings() -> None:
    wanted = {"lr": 7e-4, "gate_lr": 7e-4, "dual_lr": 1e-4, "weight_decay": 0.0}
    wanted |= {"schedule": "constant", "epochs": 200, "batch_size": 128}
    assert wanted == models.PUBLISHED_SETTINGS
    TrainerSettings(**models.PUBLISHED_SETTINGS)
