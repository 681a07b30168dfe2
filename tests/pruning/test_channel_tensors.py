"""Tensors with a number for each channel, which modules hold beside their layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    DensityConstraint,
    load_pruned,
    prune,
    prune_optimizer,
    prune_state_dict,
    save_pruned,
    sparsify_,
)
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.pruning.shrink import plan_removal, remove_
from tests.helpers.half_closed import assert_merged, assert_same, half_closed
from tests.helpers.thinned import thinned_product


class Frozen(nn.Module):
    """A batch norm of buffers, as torchvision and transformers have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, variance = (b.view(1, -1, 1, 1) for b in self.buffers())
        scale = weight * (variance + 1e-5).rsqrt()
        return x * scale + (bias - mean * scale)


class Scaled(nn.Module):
    """Two convolutions, and between them what a function does with tensors of this module."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], padding: int = 1) -> None:
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 8, 3), between
        self.second = nn.Conv2d(8, 12, 3, padding=padding)
        self.fc = nn.Linear(12, 4)
        self.gamma = nn.Parameter(torch.rand(8) + 0.5)
        self.beta = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.register_buffer("mean", torch.rand(8, 1, 1))
        self.constant = torch.rand(1, 8, 1, 1, dtype=torch.float64)
        self.norm = Frozen(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self, self.first(x))
        return self.fc(self.second(x.relu()).mean((2, 3)).relu())


def scale(model: Any, x: Tensor) -> Tensor:
    return x * model.gamma.view(1, -1, 1, 1)


def everything(model: Any, x: Tensor) -> Tensor:
    return (model.norm(scale(model, x) + model.beta) - model.mean).mul(model.constant)


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "scale": scale,
    "shift": lambda model, x: model.beta + x,
    "buffer": lambda model, x: x - model.mean,
    "constant": lambda model, x: x * model.constant,
    "frozen batch norm": lambda model, x: model.norm(x),
    "everything": everything,
}


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize(("name", "padding"), thinned_product(2, BETWEEN, [0, 1]))
def test_they_go_with_the_channels(name: str, padding: int) -> None:
    torch.manual_seed(0)
    model, x = Scaled(BETWEEN[name], padding), image()
    half_closed(model, x)
    small: Any = prune(model, x)
    assert_same(small, model, image(3))
    assert_merged(small)
    assert small.first.out_channels == small.second.in_channels == 4
    parts = {site["name"]: site["in"] for site in small.report.sites}
    held = parts.keys() - {"first", "second", "fc"}
    assert held
    assert all(parts[part] == [4, 8] for part in held)
    if name == "scale":
        # Zeros stay zeros, so that the convolution itself has the gates, one for each channel.
        assert gated_layers(model)["first"].gates == "output"
        assert small.gamma.shape == (4,)
        assert small.beta.shape == (1, 8, 1, 1)


def test_their_numbers_count_in_a_target_of_parameters() -> None:
    torch.manual_seed(0)
    model, x = Scaled(everything), image()
    half_closed(model, x)
    # It is refused where what is reckoned is not what a trial leaves.
    constraint = DensityConstraint(model, 0.4, measure="params", example_inputs=x)
    small: Any = prune(model, x, constraint)
    assert small.report.params[0] == sum(one.numel() for one in small.parameters())
    assert small.report.params[0] <= 0.4 * small.report.params[1]


def test_a_constant_of_theirs_goes_into_a_bias() -> None:
    """Behind a shift a closed channel is no zero; without padding the next bias can hold it."""
    torch.manual_seed(0)
    model, x = Scaled(BETWEEN["shift"], padding=0), image()
    sparsify_(model.double().eval(), gates="output", include="first", example_inputs=x)
    with torch.no_grad():
        model.beta.fill_(0.5)  # one value everywhere, which no probe may change
        gated_layers(model)["first"].log_alpha[:3] = -4.0
    small: Any = prune(model, x)
    assert small.report.folded == ["second"]
    assert small.beta.shape == (1, 5, 1, 1)
    assert_same(small, model, image(3))


def test_no_zero_of_theirs_is_a_fact() -> None:
    """A scale or shift that starts at zero is trained: nothing is gone because of it."""
    torch.manual_seed(0)
    for name in ("scale", "shift"):
        model, x = Scaled(BETWEEN[name]), image()
        nn.init.zeros_(model.gamma)
        nn.init.zeros_(model.beta)
        sparsify_(model.double().eval(), example_inputs=x)
        with torch.no_grad():
            for layer in gated_layers(model).values():
                layer.log_alpha.fill_(4.0)
        small: Any = prune(model, x)
        assert small.report.params[0] == small.report.params[1]
        assert small.report.notes == []


def test_what_several_modules_share_or_a_norm_has_stays() -> None:
    torch.manual_seed(0)
    model, x = Scaled(scale), image()
    model.also = nn.Module()
    model.also.gamma = model.gamma
    half_closed(model, x)
    small: Any = prune(model, x)
    assert_same(small, model, image(3))
    assert small.gamma is small.also.gamma
    assert small.gamma.shape == (8,)


def test_a_layer_norm_keeps_its_numbers() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.norm, self.two = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.norm(self.one(x)))

    torch.manual_seed(0)
    model, x = Normed(), torch.randn(5, 6, dtype=torch.float64)
    half_closed(model, x)
    small: Any = prune(model, x)
    assert_same(small, model, torch.randn(3, 6, dtype=torch.float64))
    assert small.norm.weight.shape == (8,)


def test_they_are_saved_and_their_state_is_carried(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense, x = Scaled(everything).double(), image()
    model = copy.deepcopy(dense)
    half_closed(model, x)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(x).sum().backward()
    optimizer.step()
    small: Any = prune(model, x)
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(lambda: copy.deepcopy(dense), tmp_path / "small.safetensors")
    assert_same(loaded, small, image(3))
    after: Any = prune_optimizer(optimizer, model, small)
    moment = after.state[small.gamma]["exp_avg"]
    kept = [int((model.gamma == one).nonzero()) for one in small.gamma]
    assert torch.equal(moment, optimizer.state[model.gamma]["exp_avg"][kept])
    state = prune_state_dict(model.state_dict(), model, small)
    assert all(torch.equal(state[key], value) for key, value in small.state_dict().items())


def test_they_go_during_training() -> None:
    torch.manual_seed(0)
    model, x = Scaled(everything), image()
    half_closed(model, x)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model(x).sum().backward()
    optimizer.step()
    model.eval()
    before = model(x).detach()
    kept = {name: layer.log_alpha > -3 for name, layer in gated_layers(model).items()}
    removal, _ = plan_removal(model, Example((x,)), kept)
    assert removal is not None
    remove_(model, removal, Example((x,)), False, optimizer)
    assert model.gamma.shape == (4,)
    assert optimizer.state[model.gamma]["exp_avg"].shape == (4,)
    torch.testing.assert_close(model.eval()(x), before, rtol=1e-10, atol=1e-12)
