"""Layers that read some of the same units: one gate for each unit, and each reader has its own."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, Trainer, density, param_groups, prune, sparsify_
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.constraints.ranking import magnitudes, shared_magnitudes
from l0fast.data.sets import Data
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers, sharing
from l0fast.layers.serving import likeliest
from l0fast.pruning import shrink as compaction
from l0fast.pruning.shrink import plan_removal, remove_
from tests.helpers.half_closed import assert_merged, assert_same, half_closed
from tests.helpers.runs import quick
from tests.helpers.same_run import Stop, assert_same_run
from tests.helpers.thinned import telling, thinned
from tests.helpers.zoo import ZOO, UNet


def unit(before: int, after: int, size: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, size, padding=size // 2, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    )


class Vov(nn.Module):
    """One-shot aggregation: each convolution reads the one before, the last reads all of them."""

    def __init__(self, channels: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.stem = unit(channels, 8)
        self.layers = nn.ModuleList(unit(8, 8) for _ in range(3))
        self.concat = unit(32, 12, 1)
        self.fc = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(found[-1]))
        return self.fc(self.concat(torch.cat(found, 1)).mean((2, 3)))


class Csp(nn.Module):
    """Two branches read the stem; one has a residual inside; both are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = unit(3, 8), unit(8, 6, 1), unit(8, 6, 1)
        self.inner, self.outer, self.merge = unit(6, 6), unit(6, 6), unit(20, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.right(x)
        y = y + self.outer(self.inner(y))
        return self.fc(self.merge(torch.cat([y, self.left(x), x], 1)).mean((2, 3)))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "unet": UNet,
    "densenet": ZOO["densenet"][0],
    "vov": Vov,
    "csp": Csp,
}


def built(name: str, x: Tensor | None = None) -> Any:
    """A model whose norms are not as they were made."""
    torch.manual_seed(0)
    model = BUILDS[name]().double().train()
    for _ in range(2):
        model(example(name) if x is None else x)
    return model.eval()


def example(name: str) -> Tensor:
    return torch.randn(2, 3, *(32, 32) if name == "densenet" else (16, 16), dtype=torch.float64)


def close_(model: nn.Module, share: float) -> None:
    """Closes some gates and opens the others; each part that the same layers have keeps one."""
    for layers in sharing(gated_layers(model)).values():
        log_alpha = next(iter(layers.values())).log_alpha
        scores = torch.rand(log_alpha.shape)
        closed = (scores < share) & ~likeliest(layers.values(), scores)
        with torch.no_grad():
            log_alpha.copy_(torch.where(closed, -60.0, 60.0))


@pytest.mark.parametrize("name", telling(BUILDS, ["unet", "vov", "csp"]))
def test_closed_gates_go_from_every_reader_without_gathers(name: str) -> None:
    x = example(name)
    model = half_closed(built(name), x, skip=False)
    parts = [layer for layer in gated_layers(model).values() if layer.gate_index is not None]
    assert parts
    small = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    assert_same(small, model, example(name))


@pytest.mark.parametrize(
    ("name", "share"), telling(itertools.product(BUILDS, [0.5, 1.0]), [("unet", 0.5), ("csp", 1.0)])
)
def test_sizes_are_the_pruned_models(name: str, share: float) -> None:
    x = example(name)
    model = sparsify_(built(name), example_inputs=x, skip=False)
    close_(model, share)
    small: Any = prune(model, x)
    assert_merged(small)
    assert small.report.forced == 0
    expected = {"gates": small.report.density}
    for measure in ("params", "macs", "memory"):
        after, before = getattr(small.report, measure)
        assert after < before
        expected[measure] = after / before
    for measure, value in expected.items():
        constraint = DensityConstraint(model, target=0.9, measure=measure, example_inputs=x)
        assert float(constraint.densities().detach()) == pytest.approx(value, rel=1e-9), measure


def test_what_could_go_goes() -> None:
    """Of what would be left of the UNet with half of every width but those that must stay."""
    x = example("unet")
    small: Any = prune(half_closed(built("unet"), x, skip=False), x)
    least: Any = UNet(3)
    after, before = small.report.params
    could = before - sum(one.numel() for one in least.parameters())
    assert (before - after) / could >= 0.8


def test_densities_count_each_readers_own_gates() -> None:
    model = sparsify_(built("unet"), example_inputs=example("unet"), density_init=0.6)
    layers = gated_layers(model)
    with torch.no_grad():
        layers["bottom.0"].log_alpha.copy_(torch.linspace(-3, 3, 18))
    assert (layers["bottom.0"].num_gates, layers["up.0"].num_gates) == (6, 18)
    chances = layers["up.0"].open_probability().detach()
    opened = {name: layer.own(layer.open_probability()) for name, layer in layers.items()}
    sums = {name: part.detach().sum() for name, part in opened.items()}
    assert float(sums["bottom.0"]) == pytest.approx(float(chances[:6].sum()))
    expected = sum(float(sums[name]) * layers[name].group_size for name in layers)
    total = sum(layer.weight.numel() for layer in layers.values())
    constraint = DensityConstraint(model, 0.5)
    assert float(constraint.densities().detach()) == pytest.approx(expected / total)
    assert density(model).total.expected == pytest.approx(expected / total)
    model.train()(example("unet"))  # a draw counts others than these
    densities = constraint.densities()
    assert float(densities.detach()) == pytest.approx(expected / total)
    densities.backward()
    gradient = layers["up.0"].log_alpha.grad
    assert gradient is not None
    assert bool((gradient != 0).all())


def test_one_draw_serves_every_reader() -> None:
    model = sparsify_(built("unet"), example_inputs=example("unet"), density_init=0.5)
    seen: dict[str, Tensor] = {}
    for name in ("bottom.0", "up.0"):
        layer = gated_layers(model)[name]
        layer.register_forward_hook(
            lambda module, *_, name=name: seen.update({name: module._z().detach()})
        )
    model.train()(example("unet"))
    assert torch.equal(seen["up.0"][12:], seen["bottom.0"])
    assert 0 < int((seen["up.0"] > 0).sum()) < 18


def test_magnitudes_are_over_every_reader() -> None:
    layers = gated_layers(sparsify_(built("unet"), example_inputs=example("unet")))
    bottom, up = layers["bottom.0"], layers["up.0"]
    found = shared_magnitudes(layers)["bottom.0"]
    both = magnitudes(bottom).square() * bottom.group_size
    both = both + magnitudes(up)[12:].square() * up.group_size
    both = (both / (bottom.group_size + up.group_size)).sqrt()
    torch.testing.assert_close(found, torch.cat([both, magnitudes(up)[:12]]))


@pytest.mark.filterwarnings("ignore:(attach. 40 steps are few|settle. the expected density)")
@pytest.mark.parametrize(
    ("name", "skip"),
    telling(itertools.product(BUILDS, [False, True]), [("unet", False), ("csp", True)]),
)
def test_a_training_ends_at_its_target(name: str, skip: bool) -> None:
    x, steps = example(name), 40
    model = sparsify_(built(name), example_inputs=x, skip=skip).train()
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-3, steps=steps))
    constraint = DensityConstraint(
        model, target=0.7, measure="params", example_inputs=x, steps=steps
    )
    constraint.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    small: Any = prune(model.eval(), x)
    assert 0.5 < small.report.params[0] / small.report.params[1] <= 0.7
    assert small.report.forced == 0
    assert_same(small, model, x)


@pytest.mark.parametrize("shrink", telling([2, None], []))
def test_the_trainer_trains_them(
    digits: Data, shrink: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "SELDOM", 0.3)

    def one(out: str) -> Trainer:
        torch.manual_seed(5)
        settings = quick(density=0.3, epochs=4, gate_lr=0.2, dual_lr=0.5, shrink=shrink)
        return Trainer(Vov(1, 10), digits, settings, out=tmp_path / out, device="cpu")

    first = one("undisturbed")
    summary = first.fit()
    if shrink:
        sizes = [row["params"] for row in first.history]
        assert sizes[0] > sizes[-1] >= summary["params"]
    assert summary["feasible"] is True
    assert summary["realised_density"] <= 0.3
    small: Any = first.pruned
    assert small.report.tier == "merged"
    x = digits.test.inputs
    torch.testing.assert_close(small.eval()(x), first.model.eval()(x), rtol=1e-4, atol=1e-4)

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 3:
            raise Stop("stopped")

    with pytest.raises(Stop, match="stopped"):
        one("out").fit(resume=True, on_epoch=stop)
    one("out").fit(resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


@pytest.mark.parametrize("name", thinned(BUILDS, 2))
def test_gates_that_go_for_good_go_from_every_reader(name: str) -> None:
    x = example(name)
    model = half_closed(built(name), x, skip=False)
    wanted, layers = model(x), gated_layers(model)
    kept = {key: layer.log_alpha.detach() > -3 for key, layer in layers.items()}
    optimizer = torch.optim.Adam(model.parameters())
    removal, _ = plan_removal(model, Example.of(x), kept)
    assert removal is not None
    remove_(model, removal, Example.of(x), False, optimizer)
    torch.testing.assert_close(model(x), wanted)
    for readers in sharing(layers).values():
        assert len({id(layer.log_alpha) for layer in readers.values()}) == 1
        log_alpha = next(iter(readers.values())).log_alpha
        assert bool((log_alpha > -3).all())
        used = torch.cat([layer.places() for layer in readers.values()]).unique()
        assert len(used) == len(log_alpha)
        for layer in readers.values():
            assert layer.num_gates * layer.units == layer._num_inputs()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert_same(prune(model, x), model, x)


def test_magnitude_pruning_meets_its_target() -> None:
    x = example("vov")
    model = sparsify_(built("vov"), example_inputs=x)
    baseline = MagnitudePruning(model, 0.5, steps=4, measure="params", example_inputs=x)
    for _ in range(4):
        baseline.step()
    small: Any = prune(model.eval(), x)
    assert_merged(small)
    assert small.report.params[0] <= 0.5 * small.report.params[1]
    assert small.report.forced == 0


@pytest.mark.parametrize("target", [0.3, 0.6])
def test_each_reader_keeps_a_gate_and_each_part_goes_in_blocks(target: float) -> None:
    x = example("unet")
    model = sparsify_(built("unet"), example_inputs=x)
    layers = gated_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.log_alpha.uniform_(2, 3)
        layers["up.0"].log_alpha[:6] = -5.0  # what both read
    small: Any = prune(model, x, target=target, round_to=2)
    assert small.report.density <= target
    skip, up = small.bottom[0].in_channels, small.up[0].in_channels
    assert skip >= 1
    assert skip % 2 == up % 2 == 0
    assert small.down[3].out_channels == skip
    assert small.bottom[3].out_channels == up - skip
    rows = {row["name"]: row for row in small.report.sites}
    assert (rows["bottom.0"]["gates_open"], rows["bottom.0"]["gates_total"]) == (skip, 6)
    assert (rows["up.0"]["gates_open"], rows["up.0"]["gates_total"]) == (up, 18)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, None])
def test_copies_and_states_have_the_same_parts(copied: Callable[[Any], Any] | None) -> None:
    x = example("unet")
    model = half_closed(built("unet"), x, skip=False)
    if copied is None:
        other = sparsify_(built("unet"), example_inputs=x)
        other.load_state_dict(model.state_dict())
        assert not any("index" in key for key in model.state_dict())
    else:
        other = copied(model)
    layers = gated_layers(other)
    assert layers["up.0"].log_alpha is layers["bottom.0"].log_alpha
    assert layers["bottom.0"].num_gates == 6
    assert_same(other.eval(), model, x)
    assert_same(prune(other, x), model, x)
    model.load_state_dict(built("unet").state_dict())  # of the dense model
