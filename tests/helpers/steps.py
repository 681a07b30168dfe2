"""One training step, masked and skipped, of models whose closed units can be skipped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import l0fast
import tests.helpers.plain_models as plain
from l0fast import sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.skipping.attach import stop_skipping
from l0fast.skipping.following import Following
from l0fast.training.models import build
from tests.helpers.draws import compact

DENSITIES = (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)
EXACT = 1e-10


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


Make = Callable[[], nn.Module]
# Name -> (the model, shape of its input, options of sparsify_, how many links are expected)
MODELS: dict[str, tuple[Make, tuple[int, ...], dict[str, Any], int]] = {
    "mlp": (lambda: build("mlp", (1, 4, 4), 5, (12, 7)), (8, 1, 4, 4), {}, 3),
    "lenet": (lambda: build("lenet5", (1, 8, 8), 5, (5, 6, 9)), (8, 1, 8, 8), {}, 3),
    "mlp, output gates": (
        lambda: chain(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5)),
        (8, 6),
        {"gates": "output", "exclude": "4"},  # which reads what arrives, without gates
        2,
    ),
    "no bias, GELU": (
        lambda: chain(nn.Linear(6, 9, bias=False), nn.GELU(), nn.Linear(9, 5, bias=False)),
        (8, 6),
        {},
        2,
    ),
    "tokens": (lambda: chain(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5)), (2, 3, 6), {}, 2),
    "conv1d, input gates": (
        lambda: chain(nn.Conv1d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv1d(6, 5, 3)),
        (4, 3, 9),
        {"gates": "input"},
        2,
    ),
    "conv2d, strides": (
        lambda: chain(
            nn.Conv2d(3, 6, 3, stride=2, padding=2, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(6, 5, (1, 3), dilation=2, bias=False),
        ),
        (4, 3, 12, 12),
        {},
        1,
    ),
    "a circular convolution without gates": (
        lambda: chain(
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.Tanh(), nn.Conv2d(6, 5, 3)
        ),
        (4, 3, 6, 6),
        {"gates": "input", "exclude": "0"},
        1,
    ),
    "conv3d": (
        lambda: chain(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Conv3d(4, 3, 1)),
        (2, 2, 5, 5, 5),
        {},
        1,
    ),
    "two readers": (plain.TwoReaders, (8, 6), {"gates": "input"}, 2),
    "residual": (lambda: plain.LinearStream(6, 9, 5), (8, 6), {"gates": "input"}, 2),
    "a view written out": (plain.WrittenOut, (4, 1, 8, 8), {}, 2),
    "read in training": (plain.InTraining, (8, 6), {}, 2),
    "groups": (
        lambda: chain(
            nn.Conv2d(2, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ReLU(),
            nn.Conv2d(4, 3, 1),
        ),
        (4, 2, 6, 6),
        {"gates": "input"},
        2,
    ),
    "batch norms": (
        lambda: chain(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, bias=False),
            nn.BatchNorm2d(8, affine=False),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32, 5),
        ),
        (4, 3, 8, 8),
        {},
        2,
    ),
    "a hidden layer without gates of its own": (
        lambda: chain(nn.LayerNorm(6), nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5)),
        (4, 3, 6),
        {"exclude": "1"},
        1,
    ),
    "dropout": (
        lambda: chain(
            nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5)
        ),
        (8, 6),
        {},
        3,
    ),
}


def prepared(name: str, skip: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, options, _ = MODELS[name]
    model = make().to(dtype)
    x = torch.randn(shape, dtype=dtype)
    return sparsify_(model, example_inputs=x, skip=skip, **options), x


def set_density(model: nn.Module, density: float) -> None:
    with torch.no_grad():
        for layer in gated_layers(model).values():
            # 1 and 0: far enough for every draw to be exactly that.
            extreme = density in (0.0, 1.0)
            value = 40.0 * (2 * density - 1) if extreme else layer.distribution.log_alpha(density)
            layer.log_alpha.fill_(value)


def pair() -> tuple[Any, nn.Module, Tensor]:
    """(skipped, masked, x) of the same model, with a third of the gates open."""
    torch.manual_seed(0)
    x = torch.randn(8, 6).double()
    skipped: Any = plain.Pair().double()
    sparsify_(skipped, include="b", gates="input", example_inputs=x, skip=True)
    set_density(skipped, 0.3)
    masked = copy.deepcopy(skipped)
    stop_skipping(masked)
    return skipped, masked, x


def step(model: nn.Module, x: Tensor, seed: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = model(x).square().mean() + l0fast.L0Penalty(model, 0.7)()
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(model.parameters()))
    return loss.detach(), gradients


def assert_same_step(masked: nn.Module, skipped: nn.Module, x: Tensor, tolerance: float) -> None:
    loss, expected = step(masked, x)
    got_loss, got = step(skipped, x)
    torch.testing.assert_close(got_loss, loss, rtol=tolerance, atol=0)
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        error = float((got[name] - gradient).abs().max())
        assert error <= tolerance * max(size, 1e-30), (name, error, size)
        closed = gradient == 0
        assert bool((got[name][closed].abs() <= tolerance * size).all()), name


def following(layer: nn.Module) -> Following:
    """The hook by which a layer without gates leaves out what its neighbours do."""
    (hook,) = layer._forward_pre_hooks.values()
    assert isinstance(hook, Following)
    return hook


def left_out(model: nn.Module) -> int:
    """How many layers computed with a part of their weight in the last step."""
    return sum(compact(layer) is not None for layer in gated_layers(model).values())
