"""Magnitude pruning: what it ranks, when it prunes, what it never opens again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l0fast import L0Conv2d, L0ConvTranspose2d, L0Linear, Trainer, density, sparsify_
from l0fast.constraints.magnitude import CLOSED, OPEN, MagnitudePruning
from l0fast.constraints.ranking import magnitudes, scores, shared_magnitudes
from l0fast.data.sets import Data
from tests.helpers.runs import quick, small_mlp, trainer
from tests.helpers.thinned import thinned_product

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("layer", "wanted"),
    [
        (L0Linear(3, 2), lambda w, b: [w[:, k].square().mean() for k in range(3)]),
        (
            L0Linear(3, 2, gates="output"),
            lambda w, b: [torch.cat([w[k], b[k : k + 1]]).square().mean() for k in range(2)],
        ),
        (L0Linear(3, 2, gates="weight"), lambda w, b: w.square()),
        (
            L0Conv2d(4, 6, 3, groups=2, gates="input"),
            lambda w, b: [
                w[3 * (k // 2) : 3 * (k // 2) + 3, k % 2].square().mean() for k in range(4)
            ],
        ),
        (
            L0Conv2d(4, 6, 3, bias=False),
            lambda w, b: [w[k].square().mean() for k in range(6)],
        ),
        (
            L0ConvTranspose2d(4, 6, 3, groups=2, gates="input"),
            lambda w, b: [w[k].square().mean() for k in range(4)],
        ),
        (
            L0ConvTranspose2d(4, 6, 3, groups=2),
            lambda w, b: [
                torch.cat([w[2 * (k // 3) :][:2, k % 3].flatten(), b[k : k + 1]]).square().mean()
                for k in range(6)
            ],
        ),
        (
            L0Linear.from_dense(nn.Linear(6, 2), units=3),
            lambda w, b: [w[:, :3].square().mean(), w[:, 3:].square().mean()],
        ),
    ],
)
def test_the_magnitude_is_the_root_mean_square_of_what_a_gate_controls(
    layer: Any, wanted: Any
) -> None:
    values = wanted(layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
    squares = values if isinstance(values, torch.Tensor) else torch.stack(values)
    torch.testing.assert_close(magnitudes(layer), squares.sqrt())
    assert magnitudes(layer).shape == layer.log_alpha.shape


def two_layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        for index, layer in enumerate(model):
            layer.weight.fill_(0.0)  # type: ignore[union-attr]
            layer.weight.diagonal().copy_(torch.arange(1.0, 11) + 100 * index)  # type: ignore[union-attr]
    return sparsify_(model, gates="input")


def lamp(squares: list[float]) -> list[float]:
    """Of one layer, by the definition; no two are equal."""
    return [one / sum(other for other in squares if other >= one) for one in squares]


def test_scores_are_by_the_definition() -> None:
    squares = torch.randn(3, 5).square()
    wanted = torch.tensor(lamp(squares.flatten().tolist())).view(3, 5)
    torch.testing.assert_close(scores(squares), wanted)
    assert scores(squares).max() == 1  # a layer's last one goes after all others
    torch.testing.assert_close(scores(1e4 * squares), wanted)
    assert scores(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("target", [0.5, 0.6, 0.2, {"0": 0.3, "1": 0.7}])
def test_over_all_layers_or_within_each(target: Any) -> None:
    """The smallest go first, each layer's by its own scale: the first has a hundredth of the
    second's weights, and keeps more than one unit all the same."""
    model = two_layers()
    term = MagnitudePruning(model, target, steps=10)
    term.prune_to_(0.0)
    gates = [layer.log_alpha.detach() for layer in term.layers.values()]
    ranked = [lamp([(k + 100 * index) ** 2 for k in range(1, 11)]) for index in range(2)]
    if isinstance(target, dict):
        wanted = [3, 7]
    else:
        least = sorted(ranked[0] + ranked[1])[-round(20 * target)]
        wanted = [sum(score >= least for score in layer) for layer in ranked]
    assert min(wanted) > 1
    for part, count in zip(gates, wanted, strict=True):
        assert part[-count:].tolist() == [OPEN] * count
        assert part[:-count].tolist() == [CLOSED] * (10 - count)


@pytest.mark.parametrize("gradual", [True, False])
def test_the_schedule(gradual: bool) -> None:
    """target + (1 - target)(1 - t)^3 between a tenth and six tenths; or at once in the middle."""
    model, steps, target = two_layers(), 200, 0.2
    term = MagnitudePruning(model, target, steps=steps, gradual=gradual)
    assert density(model).total.expected == 1.0
    for step in range(1, steps + 1):
        term.step()
        event = step - step % 2  # 50 events in 100 steps
        t = min(max((event - 20) / 100, 0.0), 1.0) if gradual else float(step >= 100)
        allowed = target + (1 - target) * (1 - t) ** 3
        realised = density(model).total.realised
        assert realised <= allowed + 1e-9
        assert realised > allowed - 0.1
        if step >= (120 if gradual else 100):
            assert realised == pytest.approx(target)


def test_what_is_closed_stays_closed_and_gates_are_not_trained() -> None:
    model = two_layers()
    term = MagnitudePruning(model, 0.5, steps=10)
    term.prune_to_(0.0)
    before = [layer.log_alpha.clone() for layer in term.layers.values()]
    with torch.no_grad():
        for layer in term.layers.values():
            layer.weight.copy_(layer.weight.flip(0, 1))  # the smallest are the largest now
    loss = model(torch.randn(4, 10)).square().sum() + term()
    loss.backward()
    for layer, gates in zip(term.layers.values(), before, strict=True):
        assert layer.log_alpha.grad is None
        assert layer.weight.grad is not None
        assert not layer.weight.grad[:, gates == CLOSED].any()
    term.prune_to_(0.0)
    for layer, gates in zip(term.layers.values(), before, strict=True):
        assert not ((layer.log_alpha == OPEN) & (gates == CLOSED)).any()


def test_a_draw_is_certain() -> None:
    model = two_layers()
    term = MagnitudePruning(model, 0.5, steps=10)
    term.prune_to_(0.0)
    x = torch.randn(3, 10)
    model.train()
    wanted = model(x)
    for _ in range(20):
        assert torch.equal(model(x), wanted)
    assert torch.equal(model.eval()(x), wanted)


@pytest.mark.parametrize(
    ("options", "method"),
    thinned_product(
        2,
        [
            {"density": 0.4},
            {"density": 0.3, "measure": "params"},
            {"layer_density": {"fc1": 0.5, "fc[23]": 0.6}},
            {"density": 0.3, "gates": "weight"},
        ],
        ["magnitude", "magnitude-one-shot"],
    ),
)
def test_a_training_meets_its_target(digits: Data, method: str, options: dict[str, Any]) -> None:
    one = trainer(digits, method=method, epochs=8, **options)
    summary = one.fit()
    assert summary["method"] == method
    assert summary["feasible"] is True
    assert summary["forced"] == 0  # nothing is left for pruning to close
    assert summary["test_error_percent"] == one.history[-1]["test_error_percent"] < 40
    assert [row["feasible"] for row in one.history[-3:]] == [True] * 3
    assert one.history[0]["feasible"] is False
    assert "lambda" not in one.history[0]
    if "measure" not in options and "density" in options:
        assert summary["realised_density"] == pytest.approx(options["density"], abs=0.02)


def test_it_beats_no_choice_at_all(digits: Data) -> None:
    """Ranked the other way round, the same training ends worse: the ranking matters."""
    errors: dict[bool, float] = {}
    for upside_down in (False, True):
        one = trainer(digits, method="magnitude-one-shot", density=0.3, epochs=4, gates="weight")
        term: Any = one.term
        if upside_down:
            prune = term.prune_to_

            def worst(share: float, prune: Any = prune, term: Any = term) -> None:
                weights = [layer.weight for layer in term.layers.values()]
                saved = [weight.detach().clone() for weight in weights]
                with torch.no_grad():
                    for weight in weights:
                        weight.copy_(1 / (weight.abs() + 1e-3))
                    prune(share)
                    for weight, own in zip(weights, saved, strict=True):
                        weight.copy_(own)

            term.prune_to_ = worst
        errors[upside_down] = one.fit()["test_error_percent"]
    assert errors[False] < errors[True]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"^steps: got 0; expected a whole number >= 1"):
        MagnitudePruning(two_layers(), 0.5, steps=0)
    with pytest.raises(ValueError, match=r"^method: got 'lottery'; expected one of 'l0', 'magn"):
        quick(density=0.5, method="lottery")
    with pytest.raises(ValueError, match=r"^method: got 'magnitude'; expected a density or layer"):
        quick(penalty=0.5, method="magnitude")
    with pytest.raises(ValueError, match=r"^gates: got 'some'; expected one of 'auto', 'input'"):
        quick(density=0.5, gates="some")
    with pytest.raises(ValueError, match=r"^target: got 1e-06; expected a density in \["):
        Trainer(small_mlp(), _data(), quick(density=1e-6, method="magnitude"), device="cpu")


def _data() -> Data:
    from l0fast.data import sets

    return sets.load("digits")


def test_layers_that_share_gates_are_ranked_together() -> None:
    first = L0Linear.from_dense(nn.Linear(3, 2, bias=False))
    second = L0Linear.from_dense(nn.Linear(3, 1, bias=False), shared=first)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[3.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
        second.weight.copy_(torch.tensor([[0.0, 6.0, 1.0]]))
    found = shared_magnitudes({"first": first, "second": second})
    assert list(found) == ["first"]
    torch.testing.assert_close(found["first"], torch.tensor([3.0, 12.0, 1.0]).sqrt())
    model = nn.Sequential(first, nn.Flatten(0), nn.Flatten(0))
    model[1] = nn.Sequential(second)
    pruning = MagnitudePruning(model, 0.4, steps=2, gradual=False)
    pruning.step()
    assert (first.log_alpha > 0).tolist() == [False, True, False]
