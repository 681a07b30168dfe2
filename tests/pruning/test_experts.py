"""Closed experts are gone from the pruned model, which computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from l0fast import (
    DensityConstraint,
    gates,
    load_pruned,
    param_groups,
    prune,
    prune_optimizer,
    prune_state_dict,
    save_pruned,
    sparsify_,
)
from tests.helpers.mixtures import (
    EXPERTS,
    KEPT,
    KINDS,
    PICKED,
    Dense,
    Model,
    Sparse,
    Together,
    close,
    tokens,
)
from tests.helpers.thinned import telling, thinned


def gated(kind: type[nn.Module], depth: int = 1, **options: Any) -> Any:
    torch.manual_seed(0)
    model = Model(kind, depth).double()
    return sparsify_(model, example_inputs=tokens().double(), experts=True, **options)


@pytest.mark.parametrize("kind", telling(KINDS, [Sparse, Together]))
def test_they_are_removed_exactly(kind: type[nn.Module], tmp_path: Path) -> None:
    model, x = gated(kind), tokens().double()
    close(model)
    constraint = DensityConstraint(model, 1.0, measure="params", example_inputs=x)
    expected = constraint.realised()["model"]
    del constraint
    model.eval()
    small: Any = prune(model, x).eval()
    mixture = small.mixtures[0]
    assert mixture.router.weight.shape == (4, 8)
    assert mixture.router.out_features == 4
    if kind is Together:
        assert mixture.num_experts == len(mixture.up) == len(mixture.down) == 4
    else:
        assert len(mixture.experts) == 4
    assert not any("l0fast" in type(module).__module__ for module in small.modules())
    fresh = tokens(70).double()
    torch.testing.assert_close(small(fresh), model(fresh), rtol=1e-12, atol=1e-12)
    after, before = small.report.params
    assert sum(one.numel() for one in small.parameters()) == after
    assert after / before == pytest.approx(expected, abs=1e-12)
    assert "4 of 6" in str(small.report)
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(lambda: Model(kind).double(), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(fresh), small(fresh))


@pytest.mark.parametrize("kind", thinned(KINDS, 3))
def test_the_optimizer_and_another_state_follow(kind: type[nn.Module]) -> None:
    model, x = gated(kind), tokens().double()
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    close(model.eval())
    small = prune(model, x)
    twin = prune_optimizer(optimizer, model, small)
    router = model.get_parameter("mixtures.0.router.weight")
    moment = twin.state[small.get_parameter("mixtures.0.router.weight")]["exp_avg"]
    assert torch.equal(moment, optimizer.state[router]["exp_avg"][KEPT])
    assert all(one.shape == twin.state[one]["exp_avg"].shape for one in twin.state)
    state = prune_state_dict(model.state_dict(), model, small)
    assert all(torch.equal(state[name], own) for name, own in small.state_dict().items())


def test_as_many_as_each_token_needs_are_reckoned() -> None:
    model, x = gated(Sparse), tokens().double()
    close(model, [-5.0, -9.0, -4.0, -9.0, -9.0, -9.0], share=0.0)
    realised = {
        measure: DensityConstraint(model, 1.0, measure=measure, example_inputs=x).realised()
        for measure in ("gates", "params")
    }
    total = sum(one.group_size * one.num_gates for one in gates(model).layers.values())
    closed = 4 * gates(model).layers["mixtures.0.expert_gate"].group_size
    assert realised["gates"]["model"] == pytest.approx(1 - closed / total, abs=1e-12)
    small: Any = prune(model.eval(), x)
    assert small.mixtures[0].router.out_features == PICKED
    after, before = small.report.params
    assert realised["params"]["model"] == pytest.approx(after / before, abs=1e-12)


class Numbered(Sparse):
    """The number of its experts is its own and its configuration's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = len(self.experts)


@pytest.mark.parametrize("exclude", thinned(["mixtures.1.experts.*", ""], 2))
def test_a_mixture_without_gates_keeps_its_number(exclude: str) -> None:
    """And so does what the model says of all mixtures."""
    torch.manual_seed(0)
    model: Any = Model(Numbered, 2).double()
    x, model.num_experts = tokens().double(), EXPERTS
    sparsify_(model, example_inputs=x, experts=True, exclude=exclude or None)
    close(model, share=0.0)
    small: Any = prune(model.eval(), x).eval()
    numbers = [len(mixture.experts) for mixture in small.mixtures]
    assert numbers == [mixture.num_experts for mixture in small.mixtures]
    assert numbers == ([4, 6] if exclude else [4, 4])
    assert small.num_experts == (6 if exclude else 4)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


def test_each_token_works_as_much_where_a_router_picks() -> None:
    macs = {}
    for kind in (Sparse, Dense):
        model, x = gated(kind), tokens().double()
        close(model, share=0.0)
        constraint = DensityConstraint(model, 1.0, measure="macs", example_inputs=x)
        expected = constraint.realised()["model"]
        del constraint
        pruned: Any = prune(model.eval(), x)
        after, before = pruned.report.macs
        assert after / before == pytest.approx(expected, abs=1e-12)
        macs[kind] = before - after
    router, expert = 8 * 60, (8 * 12 + 12 * 8) * 60
    assert macs == {Sparse: 2 * router, Dense: 2 * (router + expert)}


def test_the_weights_together_are_reckoned_by_parameters_alone() -> None:
    with pytest.raises(ValueError, match="aten::einsum is not reckoned"):
        DensityConstraint(gated(Together), 0.5, measure="macs", example_inputs=tokens().double())


@pytest.mark.filterwarnings("ignore:attach. .* steps are few")
@pytest.mark.parametrize("kind", thinned([Sparse, Dense], 2))
def test_a_training_ends_within_its_target(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x, steps = tokens(200), 100
    y = x.tanh() @ torch.randn(5, 3)
    skip = True if kind is Dense else "auto"  # the others have sizes that depend on the data
    model = sparsify_(Model(kind), example_inputs=x, experts=True, skip=skip)
    optimizer = torch.optim.AdamW(param_groups(model, lr=3e-3, steps=steps))
    constraint = DensityConstraint(model, 0.4, measure="params", example_inputs=x, steps=steps)
    constraint.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    assert gates(model).settled
    twin = sparsify_(Model(kind), example_inputs=x, experts=True)
    twin.load_state_dict(model.state_dict())
    small: Any = prune(model.eval(), x).eval()
    after, before = small.report.params
    assert after <= 0.4 * before
    assert len(small.get_submodule("mixtures.0.experts")._modules) >= 1
    torch.testing.assert_close(small(x), twin.eval()(x), rtol=1e-4, atol=1e-5)


def test_with_the_hidden_width_and_in_step() -> None:
    model, x = gated(Dense, depth=2, hidden=True, uniform=True), tokens().double()
    close(model)
    one, two = (gates(model).layers[f"mixtures.{i}.expert_gate"].log_alpha.data for i in (0, 1))
    two.copy_(torch.tensor([3.0, 3.0, 3.0, -5.0, 3.0, 3.0]))
    small: Any = prune(model.eval(), x).eval()
    assert [len(mixture.experts) for mixture in small.mixtures] == [4, 4]
    assert small.first.out_features < 8
    with torch.no_grad():  # the fifth of the second goes, too: those of the first are but four
        two[4] = -5.0
        one.clamp_(max=3.0)
    after, before = small.report.params
    assert sum(p.numel() for p in small.parameters()) == after < before


def test_as_many_as_each_token_needs_stay() -> None:
    model, x = gated(Sparse), tokens().double()
    close(model, [-5.0, -9.0, -4.0, -9.0, -9.0, -9.0])
    small: Any = prune(model.eval(), x, 0.9, round_to=4).eval()
    assert len(small.mixtures[0].experts) == PICKED
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
