"""Transposed convolutions: gated by structure, and smaller on both sides."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    gates,
    load_pruned,
    measure_latency,
    param_groups,
    prune,
    prune_optimizer,
    prune_state_dict,
    save_pruned,
    sparsify_,
)
from l0fast.graph.calls import Example
from l0fast.graph.capture import export
from l0fast.graph.sites import find_sites
from l0fast.layers.handle import gated_layers
from l0fast.pruning.edits import Edit, edited
from l0fast.pruning.shrink import plan_removal, remove_
from tests.helpers.half_closed import assert_merged, assert_same, half_closed
from tests.helpers.zoo import Autoencoder, dcgan, image

LATENT = torch.randn(3, 10, 1, 1, dtype=torch.float64)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def trained(model: nn.Module) -> nn.Module:
    """Batch norms that make other numbers of zeros."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    return model


def sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Channels of the weights of the transposed convolutions."""
    found = (module.weight for module in model.modules() if isinstance(module, TRANSPOSED))
    return [tuple(weight.shape[:2]) for weight in found]


# --- one layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_edit_takes_rows_of_inputs_and_columns_of_outputs(dims: int) -> None:
    layer: Any = TRANSPOSED[dims - 1](5, 4, 3, stride=2, padding=1, output_padding=1).double()
    edit = Edit("up", type(layer).__name__, (5, 4), (1, 2, 4), (0, 3), None, ((0, 1), 3))
    x = torch.randn(2, 5, *[4] * dims, dtype=torch.float64)
    outside = torch.tensor([0, 3])
    small: Any = edited(layer, edit)
    assert Edit.from_json(edit.as_json()) == edit
    assert small.layer.weight.shape == (3, 2, *[3] * dims)
    assert (small.layer.in_channels, small.layer.out_channels) == (3, 2)
    x[:, outside] = 0.0
    y = small(x[:, [1, 2, 4]])
    torch.testing.assert_close(y[:, :2], layer(x)[:, outside])
    assert not y[:, 2].any()


def test_an_edit_of_groups_takes_them_as_wholes() -> None:
    layer = nn.ConvTranspose2d(6, 9, 2, groups=3).double()
    edit = Edit("up", "ConvTranspose2d", (6, 9), (0, 1, 4, 5), (0, 1, 2, 6, 7, 8))
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    small: Any = edited(layer, edit)
    assert (small.in_channels, small.out_channels, small.groups) == (4, 6, 2)
    assert small.weight.shape == (4, 3, 2, 2)
    torch.testing.assert_close(small(x[:, edit.inputs]), layer(x)[:, edit.outputs])


class OtherPadding(nn.ConvTranspose2d):
    def _output_padding(self, *_args: Any, **_kwargs: Any) -> list[int]:
        return [1, 1]


def test_a_subclass_that_pads_otherwise_is_no_layer_of_ours() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), OtherPadding(4, 3, 3, 2))
    assert list(gated_layers(sparsify_(model, gates="input"))) == ["0"]


# --- whole models -----------------------------------------------------------------------------


def test_a_generator_loses_all_that_is_closed(tmp_path: Path) -> None:
    model = half_closed(trained(dcgan()), LATENT)
    sides = {name: layer.gates for name, layer in gated_layers(model).items()}
    assert sides == {"3": "input", "6": "input"}
    small: Any = prune(model, LATENT)
    assert_merged(small)
    assert_same(small, model, LATENT)
    assert_same(small, model, torch.randn(2, 10, 2, 3, dtype=torch.float64))
    assert sizes(small) == [(10, 8), (8, 4), (4, 3)]
    assert [small[1].num_features, small[4].num_features] == [8, 4]
    wanted = sum(p.numel() for p in dcgan(width=2).parameters())  # built half as wide
    assert small.report.params[0] == wanted
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(dcgan, tmp_path / "small.safetensors").eval()
    assert torch.equal(again(LATENT), small(LATENT))


def test_an_autoencoder_is_smaller_up_to_its_ends() -> None:
    x = image(16).double()
    model = half_closed(Autoencoder(), x)
    assert all(layer.gates == "output" for layer in gated_layers(model).values())
    assert list(gated_layers(model)) == ["encoder.0", "encoder.2", "decoder.0"]
    small: Any = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    assert sizes(small) == [(6, 4), (4, 3)]


class Groups(nn.Module):
    """A transposed convolution in groups between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ConvTranspose1d(3, 8, 3)
        self.middle = nn.ConvTranspose1d(8, 12, 3, 2, groups=4)
        self.last = nn.ConvTranspose1d(12, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())


def test_groups_go_as_wholes() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    model = half_closed(Groups(), x)
    (layer,) = gated_layers(model).values()
    assert (layer.gates, layer.units, layer.num_gates) == ("input", 3, 4)
    small: Any = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    assert (small.middle.groups, small.middle.in_channels, small.middle.out_channels) == (2, 4, 6)
    assert sizes(small) == [(3, 4), (4, 3), (6, 5)]


class UNet(nn.Module):
    """Its way up is a transposed convolution, made as large as what it is put beside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, width, 3, padding=1)
        self.bottom = nn.Sequential(nn.Conv2d(width, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, width, 3, 2, 1)
        self.head = nn.Conv2d(2 * width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        deep = self.up(self.bottom(skip), output_size=skip.shape)
        return self.head(torch.cat([deep, skip], 1))


def test_a_size_that_is_asked_for_with_channels_and_all() -> None:
    x = image(6).double()
    model = half_closed(trained(UNet()), x)
    assert gated_layers(model)["up"].gates == "input"
    small: Any = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    assert_same(small, model, image(9).double())  # with another padding
    assert sizes(small) == [(4, 4)]


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_weight_that_both_ways_share(side: str) -> None:
    class Both(nn.Module):
        """A convolution, and the transposed one of the same weight."""

        def __init__(self) -> None:
            super().__init__()
            self.there, self.back = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 3)
            self.back.weight = self.there.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.back(self.there(x).relu())

    x = image(6).double()
    model = half_closed(Both(), x, gates=side)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.back.layer.weight is small.there.layer.weight


# --- constants --------------------------------------------------------------------------------


class Constant(nn.Module):
    """A closed channel of the first layer is 0.5 where the other reads it."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 1), build()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).sigmoid())


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "borders": lambda: nn.ConvTranspose2d(6, 2, 3),
    "strides": lambda: nn.ConvTranspose2d(6, 2, 1, stride=2),
    "output padding": lambda: nn.ConvTranspose2d(6, 2, 2, stride=2, output_padding=1),
}


@pytest.mark.parametrize("name", BUILDS)
def test_constants_do_not_go_into_the_bias(name: str) -> None:
    x = image(4).double()
    torch.manual_seed(0)
    model = half_closed(Constant(BUILDS[name]), x, gates="output", include="first")
    plain = Constant(BUILDS[name]).eval()
    sites = find_sites(plain, export(plain, Example.of(x.float())), {}, {})
    assert not sites["second"].folds
    small: Any = prune(model, x)
    assert small.report.notes == []  # nothing had to be undone
    assert small.report.folded == []
    assert_same(small, model, x)
    assert sizes(small) == [(6, 2)]
    # With the gates where it reads, they go.
    model = half_closed(Constant(BUILDS[name]), x)
    small = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    assert sizes(small) == [(3, 2)]


def test_closed_inputs_leave_the_bias_everywhere() -> None:
    x = image(4).double()
    model: Any = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.Conv2d(4, 2, 1)
    )
    model = sparsify_(model.double().eval(), gates="output", include="0")
    with torch.no_grad():
        model[0].log_alpha.fill_(-9.0)
        model[0].bias.zero_()
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small[0].out_channels == small[2].in_channels == 1


# --- what goes on after, and before -----------------------------------------------------------


def fully_open_or_closed(model: Any) -> Any:
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(100.0)
            layer.log_alpha[::2] = -100.0
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def test_the_moments_of_what_is_left_go_on() -> None:
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    model = fully_open_or_closed(sparsify_(Groups().double(), example_inputs=x, skip=False))
    optimizer = torch.optim.Adam(param_groups(model, 0.01))
    for _ in range(3):
        step(model, optimizer, x)
    small: Any = prune(model, x)
    carried = prune_optimizer(optimizer, model, small)
    small.train()
    for _ in range(2):
        step(model, optimizer, x)
        step(small, carried, x)
    wanted = prune_state_dict(model.state_dict(), model, small)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("build", [Groups, Autoencoder], ids=["groups", "autoencoder"])
def test_units_are_removed_during_training(build: Callable[[], nn.Module]) -> None:
    args = (torch.randn(2, 3, 5) if build is Groups else image(16),)
    model = sparsify_(build().eval(), example_inputs=args, skip=False)
    layers = gated_layers(fully_open_or_closed(model))
    optimizer = torch.optim.Adam(param_groups(model, 1e-3))
    step(model.train(), optimizer, *args)
    expected = model.eval()(*args)
    kept = {name: layer.log_alpha > 0 for name, layer in layers.items()}
    removal, stuck = plan_removal(model, Example.of(args), kept)
    assert removal is not None
    assert not stuck
    before = sum(p.numel() for p in model.parameters())
    remove_(model, removal, Example.of(args), False, optimizer)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    torch.testing.assert_close(model(*args), expected)
    step(model.train(), optimizer, *args)  # its state has followed


@pytest.mark.parametrize("without", [[], ["4"]], ids=["gated", "plain"])
def test_a_training_step_is_not_skipped_through_them(without: list[str]) -> None:
    x = image(8).double()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.ReLU(),
        nn.Conv2d(8, 3, 3),
    ).double()  # fmt: skip
    twin = copy.deepcopy(model)
    for one, skip in ((model, True), (twin, False)):
        sparsify_(one, example_inputs=x, density_init=0.5, skip=skip, exclude=without)
    skipping = gates(model).skipping
    assert skipping is not None
    ends = [layer for link in skipping.links for layer in link.layers()]
    assert ends
    assert not any(isinstance(layer, TRANSPOSED) for layer in ends)
    results = []
    for one in (model, twin):
        torch.manual_seed(1)
        y = one(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(one.parameters()))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_they_are_timed() -> None:
    model = sparsify_(dcgan(), example_inputs=LATENT.float())
    table = measure_latency(model, LATENT.float())
    assert {"0", "3", "6"} <= table.layers.keys()
    assert table.layers["3"].inputs[-1] == 16
    assert table.layers["3"].outputs[-1] == 8
