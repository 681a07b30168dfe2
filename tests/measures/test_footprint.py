"""The pruned model's parameters and MACs, expected: equal to the real ones where gates are 0/1."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.helpers.plain_models as plain
from l0fast import DensityConstraint, prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers, sharing
from l0fast.layers.serving import likeliest
from l0fast.measures.measure import SIZES
from l0fast.pruning.trial import tried
from l0fast.training import models
from tests.helpers.counting import Counting
from tests.helpers.thinned import telling, thinned_product
from tests.helpers.zoo import ZOO

FLAT = torch.randn(2, 6)
IMAGE = torch.randn(2, 1, 28, 28)


def wide_mlp() -> nn.Sequential:
    return models.mlp(6, 3, (12, 9, 7))


def convs() -> nn.Sequential:
    """Convolutions of several kinds, pooled: one in groups, one without bias."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.SiLU(),
        nn.Conv2d(8, 9, (1, 3), bias=False),
        nn.SiLU(),
        nn.Conv2d(9, 10, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


def transposed() -> nn.Sequential:
    """Transposed convolutions: one in groups, one without bias, one with an output padding."""
    return nn.Sequential(
        nn.ConvTranspose2d(1, 8, 3, bias=False),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 2, 2, groups=4),
        nn.SiLU(),
        nn.ConvTranspose2d(12, 6, 3, 2, 1, output_padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 2, 1),
    )


def sigmoids() -> nn.Sequential:
    """A closed unit is no zero after a sigmoid."""
    return nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 9), nn.ReLU())


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (wide_mlp, FLAT),
    "lenet": (plain.small_lenet, IMAGE),
    "lenet, its sizes written out": (lambda: plain.HardCoded(6, 10, 30), IMAGE),
    "convs": (convs, IMAGE),
    "transposed": (transposed, IMAGE[..., :4, :5]),
    "sigmoids": (sigmoids, FLAT),
    "two readers": (plain.TwoReaders, FLAT),
    "called twice": (plain.CalledTwice, FLAT),
    "refused by export": (plain.DataDependent, FLAT),
    "a residual": (plain.Residual, torch.randn(2, 2, 6, 6)),
    "tied": (plain.Tied, torch.randint(11, (2, 5))),
    "its weight read outside": (plain.ReadsItsLayer, FLAT),
}


def close_at_random(model: nn.Module, share: float) -> None:
    """Gates that are open or closed for certain; one open in each layer, and in each part
    of shared gates."""
    with torch.no_grad():
        for layer in gated_layers(model).values():
            shut = torch.rand(layer.log_alpha.shape) < share
            shut.view(-1)[torch.randint(shut.numel(), (1,))] = False
            layer.log_alpha.copy_(torch.where(shut, -torch.inf, torch.inf))
        for layers in sharing(gated_layers(model)).values():
            parts = [one for one in layers.values() if one.gate_index is not None]
            for log_alpha in (one.log_alpha for one in parts[:1]):
                log_alpha[likeliest(layers.values(), log_alpha)] = torch.inf


def constrained(model: nn.Module, measure: str, x: Tensor, target: Any = 1.0) -> DensityConstraint:
    return DensityConstraint(model, target, measure=measure, example_inputs=x)


@pytest.mark.parametrize(("case", "gates"), thinned_product(2, MODELS, ["auto", "output"]))
def test_of_closed_and_open_gates_it_is_the_pruned_models_count(case: str, gates: str) -> None:
    build, x = MODELS[case]
    model = sparsify_(build().double(), gates=gates).eval()
    x = x.double() if x.is_floating_point() else x
    by_measure = {name: constrained(model, name, x) for name in SIZES}
    for name, constraint in by_measure.items():  # every gate at the bound: all but open
        with torch.no_grad():
            for layer in gated_layers(model).values():
                layer.log_alpha.fill_(torch.inf)
        assert float(constraint.densities().detach()) == 1.0, name
    smaller = 0
    close_at_random(model, 0.6)
    small: Any = prune(model, x)
    for name, constraint in by_measure.items():
        kept, dense = getattr(small.report, name)
        smaller += kept < dense
        assert float(constraint.densities().detach()) == pytest.approx(kept / dense, rel=1e-12)
        (group,) = (g for g in small.report.groups.values() if g["measure"] == name)
        assert [group["kept"], group["total"]] == [kept, dense]
        assert group["density"] == kept / dense
    assert smaller


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(nn.functional.layer_norm(x, (6,)))


BY_STRUCTURE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    name: ZOO[name]
    for name in ("vgg", "resnext", "mobilenet", "densenet", "channelwise", "dcgan", "autoencoder")
} | {"swiglu": (SwiGLU, lambda: torch.randn(2, 6))}


@pytest.mark.parametrize("case", telling(BY_STRUCTURE, ["vgg", "dcgan", "swiglu"]))
def test_of_gates_by_structure_it_is_the_pruned_models_count(case: str) -> None:
    """Behind batch norms, in groups and blocks, in both halves of a gated MLP."""
    build, example = BY_STRUCTURE[case]
    x = example().double()
    model = sparsify_(build().double().eval(), example_inputs=x)
    by_measure = {name: constrained(model, name, x) for name in ("params", "macs")}
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(torch.inf)
    for constraint in by_measure.values():
        assert float(constraint.densities().detach()) == 1.0
    for share in (0.3, 0.6):
        close_at_random(model, share)
        small: Any = prune(model, x)
        for name, constraint in by_measure.items():
            kept, dense = getattr(small.report, name)
            assert kept < dense
            assert float(constraint.densities().detach()) == pytest.approx(kept / dense, rel=1e-12)


class Flattened(nn.Module):
    """A channel is several inputs of the layer that reads it, and one gate of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).flatten(1))


WHOLE_BLOCKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a head": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 4, 16, batch_first=True), 1),
        torch.randn(2, 5, 8),
    ),
    "a flattened channel": (Flattened, torch.randn(2, 1, 5, 5)),
}


@pytest.mark.parametrize("case", WHOLE_BLOCKS)
def test_of_gates_that_are_all_closed_one_with_all_its_units_is_counted(case: str) -> None:
    build, x = WHOLE_BLOCKS[case]
    model = sparsify_(build().double().eval(), example_inputs=x.double())
    by_measure = {name: constrained(model, name, x.double()) for name in ("params", "macs")}
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(-torch.inf)
    small: Any = prune(model, x.double())
    for name, constraint in by_measure.items():
        kept, dense = getattr(small.report, name)
        assert float(constraint.densities().detach()) == pytest.approx(kept / dense, rel=1e-12)


def random_gates(model: Any) -> Any:
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.normal_(0.0, 2.0)
    return model.eval()


@pytest.mark.parametrize(
    ("case", "first", "measure", "target"),
    [
        ("lenet", "conv1", "params", 0.2),
        ("lenet, its sizes written out", "conv1", "macs", 0.4),
        ("two readers", "first", "params", 0.4),
    ],
)
def test_prune_holds_the_size_of_the_real_model_and_uses_it(
    case: str, first: str, measure: str, target: float
) -> None:
    build, x = MODELS[case]
    model = random_gates(sparsify_(build()))
    small: Any = prune(model, x, target, measure=measure)
    kept, dense = getattr(small.report, measure)
    assert target - 0.1 < kept / dense <= target
    assert small.report.forced > 0
    assert small.report.groups["model"]["density"] == kept / dense
    # A layer's own target is a share of what that layer has.
    layer: Any = model.get_submodule(first)
    alone: Any = prune(model, x, {first: 0.5}, measure=measure).report
    row = next(row for row in alone.sites if row["name"] == first)
    units = row["in"][0] * row["out"][0]
    bias = row["out"][0] if measure == "params" else 0
    area = layer.weight.numel() // (row["in"][1] * row["out"][1])
    group = alone.groups[first]
    places = 1 if measure == "params" else group["total"] // layer.weight.numel()
    assert group["kept"] == units * area * places + bias
    assert group["kept"] <= 0.5 * group["total"]


def test_the_size_holds_where_the_plan_reaches_less_far_than_the_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What export refuses is not merged; a trial that did not see it promised too much."""

    class Refused(plain.LeNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if float(x.sum()) < 1e9 else -x)

    model = random_gates(sparsify_(Refused(6, 10, 30)))
    promised = tried(sparsify_(plain.small_lenet()), Example.of(IMAGE))
    module = importlib.import_module("l0fast.pruning.prune")
    monkeypatch.setattr(module, "tried", lambda *_: promised)
    small: Any = prune(model, IMAGE, 0.2, measure="params")
    assert small.report.tier != promised[1].tier
    kept, dense = small.report.params
    assert 0.1 < kept / dense <= 0.2


def test_the_expectation_written_out() -> None:
    """MLP 6-12-9-3: a layer has the inputs of its own gates and the outputs of its reader's."""
    model = random_gates(sparsify_(models.mlp(6, 3, (12, 9)).double()))
    one, two, three = (layer.open_probability() for layer in gated_layers(model).values())
    a, b, c = one.sum(), two.sum(), three.sum()
    params = (a + 1) * b + (b + 1) * c + (c + 1) * 3
    macs = a * b + b * c + c * 3
    full = {"params": 7 * 12 + 13 * 9 + 10 * 3, "macs": 6 * 12 + 12 * 9 + 9 * 3}
    for name, cost in (("params", params), ("macs", macs)):
        got = constrained(model, name, FLAT.double()).densities()
        torch.testing.assert_close(got, (cost / full[name]).reshape(1))
        gates = [layer.log_alpha for layer in gated_layers(model).values()]
        wanted = torch.autograd.grad(cost / full[name], gates, retain_graph=True)
        for dgate, other in zip(torch.autograd.grad(got, gates), wanted, strict=True):
            torch.testing.assert_close(dgate, other)
    by_layer = constrained(model, "params", FLAT.double(), {"fc1": 0.9, "fc[23]": 0.8})
    shares = [(a + 1) * b / (7 * 12), ((b + 1) * c + (c + 1) * 3) / (13 * 9 + 10 * 3)]
    torch.testing.assert_close(by_layer.densities(), torch.stack(shares))


@pytest.mark.parametrize("gates", ["auto", "output"])
def test_a_unit_is_read_as_long_as_one_of_its_readers_is_open(gates: str) -> None:
    """The mean of what drawn gates leave is the expectation."""
    model = random_gates(sparsify_(plain.TwoReaders().double(), gates=gates))
    measure = constrained(model, "params", FLAT.double()).__dict__["_measure"]
    p = {name: layer.open_probability().detach() for name, layer in measure.layers.items()}
    with torch.no_grad():
        opened = {name: torch.rand(300, *q.shape) < q for name, q in p.items()}
        draws = torch.tensor(
            [measure.spent({n: o[i] for n, o in opened.items()})[0] for i in range(300)]
        )
    expected = float(measure().detach()) * measure.totals[0]
    spread = float(draws.std()) / 300**0.5
    assert float(draws.mean()) == pytest.approx(expected, abs=4 * spread)


def test_a_step_reads_nothing_back() -> None:
    model = sparsify_(plain.small_lenet())
    constraint = constrained(model, "macs", IMAGE, 0.5)
    model(IMAGE)
    with Counting() as counting:
        term = constraint()
        term.backward()
        constraint.step()
    assert counting.calls["segment_reduce"] == 1  # it has counted what there was
    assert counting.calls["_local_scalar_dense"] == 0
    assert sum(counting.calls.values()) < 180


@pytest.mark.parametrize("value", [15.0, 100.0])
def test_gates_that_are_all_but_certain_have_finite_gradients(value: float) -> None:
    model = sparsify_(plain.TwoReaders())
    constraint = constrained(model, "params", FLAT, 0.5)
    constraint.multiplier.fill_(1.0)
    for sign in (-1, 1):
        model.zero_grad()
        with torch.no_grad():
            for layer in gated_layers(model).values():
                layer.log_alpha.fill_(sign * value)
        constraint().backward()
        for layer in gated_layers(model).values():
            assert bool(layer.log_alpha.grad.isfinite().all())


def test_what_no_pruning_can_reach_is_refused() -> None:
    model = sparsify_(models.mlp(6, 3, (12, 9)))
    least = ((1 + 1) * 1 + (1 + 1) * 1 + (1 + 1) * 3) / (7 * 12 + 13 * 9 + 10 * 3)
    with pytest.raises(ValueError, match=r"^target: got 0.04; expected a density in") as caught:
        constrained(model, "params", FLAT, 0.04)
    assert f"[{least:.6g}, 1]" in str(caught.value)
    _held = constrained(model, "params", FLAT, least)
    small: Any = prune(model, FLAT)
    assert small.report.architecture == "1-1-1"
    # Single weights are zeros in a layer of the same shape.
    with pytest.raises(ValueError, match=r"^target: got 0.9; expected a density in \[1, 1\]"):
        constrained(sparsify_(models.mlp(6, 3, (12, 9)), gates="weight"), "params", FLAT, 0.9)


def test_constrained_training_meets_it() -> None:
    model = sparsify_(wide_mlp())
    constraint = constrained(model, "params", FLAT, 0.4)
    constraint.dual_lr.fill_(0.05)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(120):
        (model(FLAT).square().mean() + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()
    assert float(constraint.densities().detach()) < 0.42
    small: Any = prune(model, FLAT)
    kept, dense = small.report.params
    assert kept / dense <= 0.4


def test_what_is_tried_out_is_not_logged() -> None:
    build, x = MODELS["lenet, its sizes written out"]
    model = sparsify_(build(), gates="output")
    heard: list[logging.LogRecord] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record)

    ear, log = Ear(), logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(ear)
    try:
        constrained(model, "macs", x)
    finally:
        log.removeHandler(ear)
    assert [record.getMessage() for record in heard if record.levelno >= logging.WARNING] == []
