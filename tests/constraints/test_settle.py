"""Settling: the target is met within a block, nothing jumps, and what is kept is what is pruned."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    AugmentedLagrangian,
    Constraints,
    DensityConstraint,
    DualAscent,
    EqualityAscent,
    HardConcrete,
    L0Conv2d,
    L0Linear,
    L0Penalty,
    LatencyTable,
    PIControl,
    TargetSchedule,
    Trainer,
    TrainerSettings,
    density,
    frontier,
    param_groups,
    prune,
    sparsify_,
)
from l0fast.constraints.settle import LEAST, kept_open
from l0fast.data.sets import Data
from l0fast.layers.handle import gated_layers, own_gates
from l0fast.maths.advance import hold_
from l0fast.measures.latency import LayerLatency
from l0fast.training import models
from l0fast.training.checkpoint import CHECKPOINT, Checkpoint
from l0fast.training.folder import UNSETTLED
from tests.helpers.capture import Stand
from tests.helpers.counting import Counting
from tests.helpers.draws import compact
from tests.helpers.plain_models import READERS, NormedStream
from tests.helpers.runs import quick, small_lenet5, small_mlp, trainer
from tests.helpers.same_run import Stop, assert_same_run
from tests.helpers.thinned import thinned, thinned_product

pytestmark = pytest.mark.filterwarnings("ignore:settle. the expected density")

X = torch.randn(6, 1, 8, 8)


def undecided(build: Callable[[], nn.Module] | None = None, **options: Any) -> nn.Module:
    """A gated model with open probabilities from 0.1 to 1, in training."""
    torch.manual_seed(3)
    dense = small_lenet5() if build is None else build()
    chosen: dict[str, Any] = {"example_inputs": X} | options
    model = sparsify_(dense, **chosen)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.uniform_(-4, 3)
    return model.train()


def gates(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.log_alpha for name, layer in gated_layers(model).items()}


def opened(model: nn.Module) -> dict[str, Tensor]:
    return {n: layer.evaluation_gates() > 0 for n, layer in gated_layers(model).items()}


# --- the maths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [HardConcrete(), HardConcrete(0.4, -0.3, 1.2)], ids=["default", "x"])
def test_the_mean_of_a_gate(of: HardConcrete) -> None:
    log_alpha = torch.tensor([-12.0, -4.0, -1.6, -0.5, 0.0, 1.0, 3.0, 9.0], dtype=torch.float64)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    wanted = torch.stack([of.gate(one, torch.logit(u)).mean() for one in log_alpha])
    torch.testing.assert_close(of.mean(log_alpha), wanted, rtol=0, atol=1e-5)
    z = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(of.median(of.location(z)), z)


# --- the target ----------------------------------------------------------------------------------


def latencies() -> LatencyTable:
    """Of LeNet 6-8-20, proportional to the work."""

    def layer(inputs: int, outputs: int, cost: float) -> LayerLatency:
        sides = sorted({1, inputs}), sorted({1, outputs})
        return LayerLatency(*sides, [[cost * i * o for o in sides[1]] for i in sides[0]])

    widths = {"conv1": (1, 6), "conv2": (6, 8), "fc1": (32, 20), "fc2": (20, 10)}
    return LatencyTable({name: layer(i, o, 1e-6) for name, (i, o) in widths.items()}, 0.0, {})


def units(probabilities: Any) -> Tensor:
    return torch.stack([p.sum() for p in probabilities.values()]).sum()


ASKED = {
    "gates": (0.2, 0.5, 0.8),
    "params": (0.3, 0.7),
    "macs": (0.3,),
    "memory": (0.4,),
    "latency": (0.4,),
    "weight": (0.3, 0.8),
    "layers": (0.5,),
    "cost": (0.5,),
}


@pytest.mark.parametrize(
    ("measure", "target"), thinned([(name, target) for name in ASKED for target in ASKED[name]], 4)
)
def test_no_further_gate_fits(measure: str, target: float) -> None:
    """And so the target is met within one; pruning has none to close."""
    model = undecided(gates="weight" if measure == "weight" else "auto")
    options: dict[str, Any] = {"measure": measure, "example_inputs": X}
    asked: Any = target
    if measure == "latency":
        options["measure"] = latencies()
    elif measure in ("weight", "layers"):
        options = {}
        asked = {"conv*": target, "fc1": 0.9 * target} if measure == "layers" else target
    elif measure == "cost":
        options = {"measure": units}
    term = DensityConstraint(model, asked, **options)
    short = {name: t - term.realised()[name] for name, t in term.targets.items()}
    order = {name: one.detach().clone() for name, one in gates(model).items()}
    free = opened(model)
    term.settle()
    kept, realised = opened(model), term.realised()
    assert all(realised[name] <= t for name, t in term.targets.items())
    covered = {layer for group in term.groups.values() for layer in group.layers}
    for name, layer in gated_layers(model).items():
        # The likeliest of each layer.
        if not bool(kept[name].all()):
            assert order[name][kept[name]].min() >= order[name][~kept[name]].max()
        if name not in covered:
            assert torch.equal(kept[name], free[name])
            continue
        closed = (~kept[name]).flatten().nonzero().flatten()
        if not len(closed):
            continue
        likeliest = int(closed[order[name].flatten()[closed].argmax()])
        with torch.no_grad():
            before = layer.log_alpha.flatten()[likeliest].item()
            layer.log_alpha.view(-1)[likeliest] = 3.0
        over = [term.realised()[n] > t for n, t in term.targets.items()]
        assert any(over), name
        with torch.no_grad():
            layer.log_alpha.view(-1)[likeliest] = before
    report: Any = prune(model, X).report
    assert report.forced == 0
    assert report.filled == 0
    for name, group in report.groups.items():
        assert group["density"] <= group["target"]
        if name in realised:
            assert group["density"] == pytest.approx(realised[name], rel=1e-6)
    if measure == "weight":
        assert abs(short["model"]) > 0.01  # or there was nothing to do
        assert target - realised["model"] < 1 / sum(one.numel() for one in kept.values())


def test_one_of_several_constraints_is_not_settled_alone() -> None:
    model = undecided()
    one = DensityConstraint(model, 0.5)
    two = DensityConstraint(model, 0.3, measure="macs", example_inputs=X)
    before = {name: value.clone() for name, value in gates(model).items()}
    line = r"^settle: got 'conv1 conv2 fc1 fc2 by macs'; expected no other targets on the model\."
    with pytest.raises(ValueError, match=line):
        one.settle()
    with pytest.raises(ValueError, match=r"^settle: got '.* by gates'; expected no other targets"):
        Constraints([two]).settle()
    assert not one.settled
    assert all(torch.equal(value, before[name]) for name, value in gates(model).items())
    Constraints([one, two]).settle()
    assert one.settled
    assert two.settled


def test_several_constraints_are_settled_together() -> None:
    model = undecided()
    one = DensityConstraint(model, 0.5)
    two = DensityConstraint(model, 0.3, measure="macs", example_inputs=X)
    both = Constraints([one, two])
    one.multiplier.fill_(2.0)
    two.multiplier.fill_(3.0)
    assert not both.settled
    both.settle()
    assert one.realised()["model"] <= 0.5
    assert two.realised()["model"] <= 0.3
    assert one.settled
    assert two.settled
    assert both.settled
    assert both().item() == 0
    both.step()
    assert one.multiplier.item() == two.multiplier.item() == 0
    report: Any = prune(model, X).report
    assert report.forced == 0
    alone = undecided()
    DensityConstraint(alone, 0.5).settle()
    assert any(bool((kept & ~opened(model)[n]).any()) for n, kept in opened(alone).items())


def test_a_penalty_keeps_what_is_open() -> None:
    model = undecided()
    term = L0Penalty(model, 0.5)
    wanted = opened(model)
    assert term().item() > 0
    term.settle()
    assert all(torch.equal(kept, wanted[name]) for name, kept in opened(model).items())
    assert term().item() == 0
    assert term.settled
    assert density(model).total.expected == density(model).total.realised


def test_it_warns_where_much_is_closed_at_once() -> None:
    line = (
        r"^settle: the expected density of 'model' is 0\.\d+, far above its target 0\.3, so units "
    )
    model = undecided()
    assert 0.6 < float(density(model).total.expected) < 0.7
    term = DensityConstraint(model, 0.3)
    before = {name: value.clone() for name, value in gates(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=line):
            term.settle()  # nothing has changed
    assert not term.settled
    assert all(torch.equal(value, before[name]) for name, value in gates(model).items())
    with pytest.warns(UserWarning, match=line):
        term.settle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        term.settle()  # nothing is closed any more
    both = Constraints([DensityConstraint(undecided(), 0.3)])
    with pytest.warns(UserWarning, match=line) as caught:
        both.settle()
    assert len(caught) == 1
    assert both.settled


def test_the_advice_is_of_use() -> None:
    model = undecided()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = DensityConstraint(model, 0.3, steps=300, start=0).attach(optimizer)
    with pytest.warns(UserWarning, match=r"^settle: .* closed now\. The gates had too few steps"):
        attached.settle()
    with pytest.warns(UserWarning, match=r"have not followed: give Adam .* or attach the con"):
        DensityConstraint(undecided(), 0.3, steps=300, start=0).settle()
    with pytest.warns(UserWarning, match=r"Give the constraint the `steps` of the training"):
        DensityConstraint(undecided(), 0.3).settle()


@pytest.mark.parametrize(("target", "most"), [(0.5, 0.6), (0.1, 0.15)])
def test_what_much_is(target: float, most: float) -> None:
    """A tenth of all, or half of the target."""
    for density_init, warns in ((most - 0.005, False), (most + 0.005, True)):
        model = undecided(density_init=density_init)
        with torch.no_grad():
            for layer in gated_layers(model).values():
                layer.log_alpha.fill_(layer.distribution.log_alpha(density_init))
        term = DensityConstraint(model, target)
        assert float(term.densities().detach()) == pytest.approx(density_init, abs=1e-3)
        assert (term.lag() is not None) == warns


def test_a_penalty_does_not_settle_gates_that_have_targets() -> None:
    model = undecided()
    term = L0Penalty(model, 0.5)
    constraint = DensityConstraint(model, 0.5)
    before = {name: value.clone() for name, value in gates(model).items()}
    with pytest.raises(ValueError, match=r"^settle: got '.* by gates'; expected no other targets"):
        term.settle()
    assert not term.settled
    assert all(torch.equal(value, before[name]) for name, value in gates(model).items())
    constraint.settle()
    assert term.settled
    assert term().item() == 0


def test_a_layer_whose_gates_are_all_closed() -> None:
    """Stays so without a target; under one, the likeliest is opened: it counts anyway."""
    for target in (None, 0.3):
        model = undecided()
        closed: Any = gated_layers(model)["conv2"]
        with torch.no_grad():
            closed.log_alpha.sub_(7)
        likeliest = closed.log_alpha.argmax().item()
        term: Any = L0Penalty(model, 0.5) if target is None else DensityConstraint(model, target)
        term.settle()
        kept = opened(model)["conv2"]
        assert int(kept.sum()) == (0 if target is None else 1)
        assert bool(kept[likeliest]) == (target is not None)


def test_shared_gates_are_settled_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    model = sparsify_(NormedStream(), example_inputs=x).train()
    layers = gated_layers(model)
    assert set(READERS) <= set(layers)
    with torch.no_grad():
        for name in own_gates(layers):
            layers[name].log_alpha.uniform_(-3, 2)
    of, shared = layers["head"].distribution, layers["head"].log_alpha
    mean = of.mean(shared.detach().double())
    DensityConstraint(model, 0.6).settle()
    assert all(layers[name].log_alpha is shared for name in READERS)
    assert all(layers[name].settled for name in READERS)
    kept = shared > -5
    assert 0 < kept.sum() < len(kept)
    torch.testing.assert_close(of.median(shared)[kept].double(), mean[kept], rtol=1e-5, atol=1e-5)
    assert prune(model, x).report.forced == 0  # type: ignore[index]


# --- the function, and its gradients -------------------------------------------------------------

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear, input": lambda: L0Linear(8, 5),
    "linear, output": lambda: L0Linear(8, 5, gates="output"),
    "linear, weight": lambda: L0Linear(8, 5, gates="weight"),
    "linear, example": lambda: L0Linear(8, 5, noise="example"),
    "output, example": lambda: L0Linear(8, 5, gates="output", noise="example"),
    "conv, output": lambda: L0Conv2d(8, 5, 3),
    "conv, input": lambda: L0Conv2d(8, 5, 3, gates="input"),
    "conv, example": lambda: L0Conv2d(8, 5, 3, noise="example"),
    "conv, weight": lambda: L0Conv2d(8, 5, 3, gates="weight"),
}


@pytest.mark.parametrize(("kind", "within"), thinned_product(2, LAYERS, [False, True]))
def test_the_function_is_the_mean_of_the_noisy_one(kind: str, within: bool) -> None:
    torch.manual_seed(1)
    layer: Any = LAYERS[kind]().double()
    model: nn.Module = nn.Sequential(layer)
    if within:
        sparsify_(model)  # which attaches the draw
    with torch.no_grad():
        layer.log_alpha.uniform_(-2, 3)
    x = torch.randn(3, 8, 5, 5) if "conv" in kind else torch.randn(3, 8)
    x, call = x.double(), model if within else layer
    call.train()
    with torch.no_grad():
        noisy = torch.stack([call(x) for _ in range(4000)])
    term = DensityConstraint(model, 1.0)
    term.settle()
    y = call(x)
    error = noisy.std(0) / math.sqrt(len(noisy))
    assert ((y - noisy.mean(0)).abs() <= 5 * error + 1e-4).all()
    assert noisy.std(0).max() > 0.01
    torch.testing.assert_close(call(x), y, rtol=0, atol=0)
    torch.testing.assert_close(call.eval()(x), y)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind: str) -> None:
    """Those of the evaluation gates; exactly 0 where a gate is closed."""
    torch.manual_seed(1)
    layer: Any = LAYERS[kind]().double()
    model = nn.Sequential(layer)
    with torch.no_grad():
        layer.log_alpha.uniform_(-3, 3)
    x = torch.randn(3, 8, 5, 5) if "conv" in kind else torch.randn(3, 8)
    term = DensityConstraint(model, 0.6)
    term.settle()
    model.train()
    z = layer.evaluation_gates().detach()
    (model(x.double()).square().sum() + term()).backward()
    got = layer.log_alpha.grad
    closed = z == 0
    assert bool(closed.any())
    assert (got[closed] == 0).all()
    assert (got[(z > 0) & (z < 1)] != 0).all()
    layer.log_alpha.grad = None
    model.eval()
    model(x.double()).square().sum().backward()
    torch.testing.assert_close(got, layer.log_alpha.grad)


def test_closed_units_are_skipped() -> None:
    def build() -> nn.Module:
        return models.build("mlp", (1, 8, 8), 10, (32, 16)).double()

    grads: list[list[Tensor]] = []
    for skip in (True, False):
        model = undecided(build, skip=skip, example_inputs=X.double())
        DensityConstraint(model, 0.3).settle()
        model(X.double()).square().sum().backward()
        if skip:
            layer: Any = gated_layers(model)["fc2"]
            assert len(compact(layer).cols) == int(opened(model)["fc2"].sum())
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# --- from then on --------------------------------------------------------------------------------

DUALS = {
    "ascent": DualAscent(0.5),
    "pi": PIControl(0.5, proportional=1.0),
    "augmented": AugmentedLagrangian(0.5, penalty=1.0),
    "equality": EqualityAscent(0.5),
    "first": DualAscent(0.5, dual_first=True),
}


@pytest.mark.parametrize("dual", DUALS)
def test_there_is_no_pressure_any_more(dual: str) -> None:
    model = undecided()
    term = DensityConstraint(model, 0.4, dual=DUALS[dual], schedule=TargetSchedule(100))
    for _ in range(3):
        term()
        term.step()
    restarts = term.restarts.clone()
    term.settle()
    for _ in range(3):
        loss = term()
        assert loss.item() == 0
        assert not loss.requires_grad
        term.step()
    for name in {"multiplier", *term.dual.memory} - {"restarts"}:
        assert term.get_buffer(name).item() == 0, name
    assert torch.equal(term.restarts, restarts)
    assert term.current_target.item() == pytest.approx(0.4)
    assert term.densities().item() == pytest.approx(term.realised()["model"])
    assert term.violation.item() <= 0


def test_what_is_kept_stays_open_and_what_is_closed_stays_closed() -> None:
    model = undecided()
    term = DensityConstraint(model, 0.4)
    term.settle()
    wanted = opened(model)
    for push in (-2.0, 2.0):
        with torch.no_grad():
            for log_alpha in gates(model).values():
                log_alpha += push
        term.step()
        for name, kept in opened(model).items():
            assert torch.equal(kept, wanted[name])
    for layer in gated_layers(model).values():
        z = layer.evaluation_gates()
        assert ((z == 0) | (z >= LEAST * 0.999)).all()
        assert (layer.log_alpha.abs() <= layer.distribution.bound).all()


@pytest.mark.parametrize("layers", [2, 9])
def test_many_layers_are_held_by_few_operations(layers: int) -> None:
    model = sparsify_(nn.Sequential(*(nn.Linear(5, 5) for _ in range(layers))))
    constraint = DensityConstraint(model, 0.5)
    constraint.settle()
    before = [layer.log_alpha.clone() for layer in gated_layers(model).values()]
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.add_(torch.randn(5).mul(0.1)).clamp_(max=20)
    wanted = [layer.log_alpha.clone() for layer in gated_layers(model).values()]
    for log_alpha in wanted:
        hold_(log_alpha, kept_open(HardConcrete()))
    with Counting() as counting:
        constraint.step()
    views = {"view", "split", "split_with_sizes", "flatten", "detach"}
    assert sum(n for name, n in counting.calls.items() if name not in views) <= 7, counting.calls
    got = [layer.log_alpha for layer in gated_layers(model).values()]
    for one, expected, was in zip(got, wanted, before, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(one > 0, was > 0)


def test_a_bound_that_keeps_gates_open_does_not_hold_them_here() -> None:
    model = undecided(distribution=HardConcrete(bound=1.0))
    term = DensityConstraint(model, 0.9)
    term.settle()
    wanted = opened(model)
    term.step()
    assert term.realised()["model"] <= 0.9
    assert all(torch.equal(kept, wanted[name]) for name, kept in opened(model).items())
    assert not all(bool(kept.all()) for kept in wanted.values())


def test_a_second_time_changes_nothing_and_a_new_constraint_starts_anew() -> None:
    model = undecided()
    term = DensityConstraint(model, 0.4)
    term.settle()
    states = copy.deepcopy(model.state_dict()), copy.deepcopy(term.state_dict())
    term.settle()
    for before, after in zip(states, (model.state_dict(), term.state_dict()), strict=True):
        assert {k: v for k, v in before.items() if not isinstance(v, Tensor)} == {
            k: v for k, v in after.items() if not isinstance(v, Tensor)
        }
        assert all(torch.equal(v, after[k]) for k, v in before.items() if isinstance(v, Tensor))
    torch.testing.assert_close(model(X), model.eval()(X))  # no noise after the second, either
    other = DensityConstraint(model, 0.3)
    model.train()
    assert not other.settled
    assert not torch.equal(model(X), model(X))


def test_the_optimizer_forgets_the_gates_alone() -> None:
    model = undecided()
    term = DensityConstraint(model, 0.4)
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3, 1e-2))
    (model(X).square().mean() + term()).backward()
    optimizer.step()
    term.settle(optimizer)
    for name, parameter in model.named_parameters():
        assert (parameter in optimizer.state) == ("log_alpha" not in name)
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


def test_it_refuses_before_it_changes() -> None:
    model = undecided()
    term = DensityConstraint(model, 0.4)
    before = copy.deepcopy(model.state_dict())
    wrong: Any = "adam"
    with pytest.raises(TypeError, match=r"^optimizer: got 'str'; expected a torch.optim.Optimizer"):
        term.settle(wrong)
    layers = list(gated_layers(model).values())
    with torch.no_grad():
        layers[-1].log_alpha[0] = math.nan
    with pytest.raises(ValueError, match=r"^log_alpha: got nan"):
        term.settle()
    assert not term.settled
    layers[-1].log_alpha.data[0] = before[f"{list(gated_layers(model))[-1]}.log_alpha"][0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_term_that_is_refused_leaves_them_settled() -> None:
    model = undecided()
    term = DensityConstraint(model, 0.4)
    term.settle()
    with pytest.raises(ValueError, match=r"^target: got 1e-09"):
        DensityConstraint(model, 1e-9)
    with pytest.raises(ValueError, match=r"^num_examples: got 0"):
        L0Penalty(model, 0.1, 0)
    assert term.settled
    L0Penalty(model, 0.1)
    assert not term.settled


# --- a loop of one's own -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["constraint", "constraints", "penalty"])
def test_a_loop_of_ones_own_and_its_resumption(kind: str) -> None:
    """A fresh process that loads the states goes on bit for bit."""
    y = torch.arange(len(X)) % 10

    def made() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = undecided()
        term: Any = L0Penalty(model, 0.1) if kind == "penalty" else DensityConstraint(model, 0.4)
        if kind == "constraints":
            term = Constraints([term])
        return model, term, torch.optim.AdamW(param_groups(model, 1e-3, 5e-2))

    def step(model: nn.Module, term: Any, optimizer: torch.optim.Optimizer) -> None:
        (nn.functional.cross_entropy(model(X), y) + term()).backward()
        optimizer.step()
        optimizer.zero_grad()
        term.step()

    one = made()
    for number in range(8):
        if number == 4:
            one[1].settle(one[2])
        step(*one)
    states = [copy.deepcopy(part.state_dict()) for part in one]
    rng = torch.get_rng_state()
    for _ in range(3):
        step(*one)
    assert torch.equal(torch.get_rng_state(), rng)  # nothing is drawn
    other = made()
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    for _ in range(3):
        step(*other)
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name
    report: Any = prune(other[0], X).report
    assert report.forced == 0
    torch.testing.assert_close(prune(one[0], X).eval()(X), one[0](X), rtol=1e-4, atol=1e-5)


# --- the trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settle", "epochs", "options", "at"),
    [
        (0.1, 20, {}, 18),
        (0.1, 3, {}, 2),
        (0.05, 100, {}, 95),
        (0.9, 2, {"start": 0.0}, 1),
        (0.1, 1, {}, 1),
        (0, 20, {}, 20),
        (0.1, 20, {"density": None}, 20),
        (0.1, 20, {"method": "magnitude"}, 20),
        (0.1, 20, {"density": None, "penalty": 1.0}, 18),
    ],
    ids=str,
)
def test_which_epochs(settle: float, epochs: int, options: dict[str, Any], at: int) -> None:
    settings: dict[str, Any] = {"density": 0.5, "settle": settle, "epochs": epochs} | options
    assert TrainerSettings(**settings).settles_at == at


@pytest.mark.parametrize(
    "changes",
    thinned([{}, {"measure": "params"}, {"gates": "weight"}, {"density": None, "penalty": 0.5}], 3),
    ids=str,
)
def test_the_last_epochs_train_what_is_pruned(digits: Data, changes: dict[str, Any]) -> None:
    options: dict[str, Any] = {"density": 0.3, "settle": 0.25, "epochs": 8} | changes
    one = trainer(digits, **options)
    summary = one.fit()
    assert [row["settled"] for row in one.history] == [False] * 6 + [True] * 2
    last = one.history[-1]
    assert last["expected_density"] == last["realised_density"]
    assert summary["forced"] == 0
    assert summary["validation_error_percent"] == last["validation_error_percent"]
    assert summary["test_error_percent"] == last["test_error_percent"]
    if "penalty" not in changes:
        assert last["lambda"] == {"model": 0.0}
        assert last["feasible"]
        report: Any = one.pruned
        (group,) = report.report.groups.values()
        assert 0 <= group["target"] - group["density"] < 0.01
    kept = [{n: layer["kept"] for n, layer in row["layers"].items()} for row in one.history]
    assert kept[-1] == kept[-2]
    assert kept[-2] != kept[-3] or "penalty" in changes


def test_a_collapse_before_is_told(digits: Data) -> None:
    one = trainer(digits, density=0.1, epochs=3, dual_lr=30.0, start=0, restarts=False, settle=0.34)
    summary = one.fit()
    assert summary["reopened"] == one.history[1]["collapsed"] != []
    assert summary["collapsed"] == []


@pytest.mark.parametrize(
    ("changes", "stop"),
    thinned_product(9, [{}, {"shrink": 2}, {"select": "best"}], [3, 4, 5]),
    ids=str,
)
def test_an_interruption_changes_nothing(
    digits: Data, tmp_path: Path, stop: int, changes: dict[str, Any]
) -> None:
    options = {"density": 0.3, "settle": 0.34, "epochs": 6} | changes
    trainer(digits, tmp_path / "undisturbed", **options).fit()

    def interrupt(row: dict[str, Any]) -> None:
        if row["epoch"] == stop:
            raise Stop("stopped")

    with pytest.raises(Stop, match="stopped"):
        trainer(digits, tmp_path / "out", **options).fit(on_epoch=interrupt)
    torch.manual_seed(99)
    trainer(digits, tmp_path / "out", **options).fit(resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


def test_what_is_closed_is_removed_at_once(digits: Data) -> None:
    one = trainer(digits, density=0.3, settle=0.25, epochs=8, shrink=8)
    one.fit()
    params = [row["params"] for row in one.history]
    assert params[:6] == [params[0]] * 6
    assert params[6] == params[7] < params[0]
    for name in ("fc2", "fc3"):  # what can go without a gather
        kept = one.history[-1]["layers"][name]["kept"]
        assert (
            gated_layers(one.model)[name].num_gates == kept < one.history[0]["layers"][name]["of"]
        )
    pruned: Any = one.pruned
    (group,) = pruned.report.groups.values()
    assert 0 <= group["target"] - group["density"] < 0.01


def test_a_graph_is_captured_anew(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = Stand(monkeypatch)
    one = trainer(digits, density=0.5, settle=0.34, epochs=3, skip=False)
    one.fit()
    assert stand.captured == 3  # with all gates open, drawn and settled


@pytest.mark.parametrize("shrink", thinned([None, 1], 2))
def test_a_frontier_goes_on_from_before(digits: Data, tmp_path: Path, shrink: int | None) -> None:
    settings = quick(density=0.9, epochs=6, settle=0.34, shrink=shrink)
    frontier(
        small_mlp(), digits, settings, (0.7, 0.3), out=tmp_path / "f", device="cpu",
        train=lambda one: one.fit(),
    )  # fmt: skip
    folder = tmp_path / "f" / "density-0.7"
    before = Checkpoint.read(folder / UNSETTLED, torch.device("cpu"))
    end = Checkpoint.read(folder / CHECKPOINT, torch.device("cpu"))
    assert (before.epoch, end.epoch) == (4, 6)
    assert (before.history[-1]["settled"], end.history[-1]["settled"]) == (False, True)
    assert not (tmp_path / "f" / "density-0.3" / UNSETTLED).exists()
    if shrink is not None:
        return
    # The second by hand, from there.
    second = Trainer(small_mlp(), digits, quick(epochs=6, settle=0.34, density=0.3), device="cpu")
    second.open(start_from=before)
    second.fit()
    wanted = Checkpoint.read(tmp_path / "f" / "density-0.3" / CHECKPOINT, torch.device("cpu"))
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, wanted.model[name]), name


def test_a_loss_that_was_formed_before_settling_still_goes_backward() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))
    sparsify_(model, gates="input")
    constraint = DensityConstraint(model, 0.5)
    x = torch.randn(4, 6)
    loss = model(x).square().mean() + constraint()
    before = model[0].open_probability()
    constraint.settle()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(model[0].open_probability(), before)
    assert float(constraint.densities().detach()) <= 0.5
