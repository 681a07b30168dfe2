"""Gates on experts: where sparsify_ puts them, what they do, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from l0fast import gates, sparsify_
from tests.helpers.mixtures import (
    EXPERTS,
    GATES,
    KEPT,
    KINDS,
    Dense,
    Model,
    Sparse,
    Together,
    close,
    tokens,
)
from tests.helpers.thinned import thinned

GATE = "mixtures.0.expert_gate"


def gated(kind: type[nn.Module] = Sparse) -> Any:
    torch.manual_seed(0)
    return sparsify_(Model(kind).double(), example_inputs=tokens().double(), experts=True)


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_change_nothing(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = Model(kind).eval(), tokens()
    before = model(x)
    sparsify_(model, example_inputs=x, experts=True, density_init=1.0)
    assert gates(model).layers[GATE].num_gates == EXPERTS
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_closed_experts_are_not_picked_and_the_others_are_multiplied() -> None:
    model = gated(Sparse).eval()
    close(model, share=0.0)
    mixture, gate = model.mixtures[0], gates(model).layers[GATE]
    z = gate.evaluation_gates().detach()
    assert z[KEPT].gt(0).all()
    assert 0.0 < z[2] < 1.0
    x = torch.randn(30, 8).double()
    logits = x @ mixture.router.weight.T + mixture.router.bias
    weights, picked = logits[:, KEPT].softmax(-1).topk(2, -1)
    expected = torch.zeros_like(x)
    for row in range(30):
        for weight, place in zip(weights[row], picked[row].tolist(), strict=True):
            expert: Any = mixture.experts[KEPT[place]]
            given = expert(x[row : row + 1])[0]
            expected[row] += weight * z[KEPT[place]] * given
    torch.testing.assert_close(mixture(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_open_learns_and_what_is_closed_does_not(kind: type[nn.Module]) -> None:
    model, x = gated(kind), tokens().double()
    gate = gates(model).layers[GATE]
    gates(model).set_stage("settled")
    with torch.no_grad():
        gate.log_alpha.copy_(torch.tensor([-5.0, 0.2, 0.1, 0.3, -5.0, -0.2]))
    model(x).square().sum().backward()
    grad: Tensor = gate.log_alpha.grad
    assert (grad != 0).tolist() == [False, True, True, True, False, True]
    own = model.mixtures[0]
    used = own.down.grad.abs().sum((1, 2)) if hasattr(own, "down") else None
    for place in (0, 4):
        closed = used[place] if used is not None else own.experts[place].down.weight.grad
        assert closed is None or not closed.any()
        assert not own.router.weight.grad[place].any()


def test_as_many_as_each_token_needs_can_be_picked() -> None:
    model = gated(Sparse)
    for training in (True, False):
        close(model.train(training), [-5.0, -9.0, -4.0, -9.0, -9.0, -9.0])
        with torch.no_grad():
            given = model(tokens().double())
        assert torch.isfinite(given).all()


def test_the_table_has_them() -> None:
    table = sparsify_(Model(), example_inputs=tokens(), experts=True, dry_run=True)
    (row,) = (row for row in table.layers if row.kind == "Experts")
    expert = 8 * 12 + 12 + 12 * 8 + 8
    assert (row.name, row.gates, row.num_gates) == (GATE, "expert", EXPERTS)
    assert row.units == expert + 8 + 1
    assert row.reason.endswith("each token needs 2")


def test_the_table_says_why_units_of_experts_have_no_gates() -> None:
    table = sparsify_(Model(Together), example_inputs=tokens(), experts=True, dry_run=True)
    (row,) = (row for row in table.layers if row.kind == "Experts")
    assert "their units have no gates, since one tensor has the weights of all" in row.reason


def test_experts_without_gates_of_their_own_take_no_part() -> None:
    with pytest.raises(ValueError, match=r"'mixtures.0.experts': not all of its layers may have"):
        sparsify_(
            Model(), example_inputs=tokens(), experts=True, exclude="mixtures.0.experts.1.down"
        )


class Checkpointed(Sparse):
    """Each expert, and the router, is computed again in the backward."""

    reentrant, again = False, True

    def forward(self, x: Tensor) -> Tensor:
        def call(module: nn.Module, x: Tensor) -> Tensor:
            return checkpoint(module, x, use_reentrant=self.reentrant) if self.again else module(x)

        weights, picked = call(self.router, x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            token, column = torch.where(picked == place)
            y = y.index_add(0, token, weights[token, column, None] * call(expert, x[token]))
        return y


def gradients(model: Any, again: bool) -> dict[str, Tensor]:
    for mixture in model.mixtures:
        mixture.again = again
    torch.manual_seed(5)
    model.zero_grad()
    y = model(tokens().double())
    with torch.no_grad():  # what is looked at in between changes nothing
        model.eval()(tokens(30).double())
    copy.deepcopy(model.train())
    y.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", thinned(["drawn", "open", "settled"], 3))
def test_activation_checkpointing_inside_a_mixture(stage: str) -> None:
    model = gated(Checkpointed)
    close(model, share=0.0)
    gates(model).set_stage(stage)
    plain, checkpointed = (gradients(model, again) for again in (False, True))
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, msg=name)


def test_several_forward_passes_before_a_backward_are_refused() -> None:
    model, x = gated(Checkpointed), tokens().double()
    kept = model(x), model(x)
    with pytest.raises(RuntimeError, match="got several forward passes before a backward"):
        kept[0].sum().backward()


def test_reentrant_checkpointing_is_refused() -> None:
    model, x = gated(Checkpointed), tokens().double()
    model.mixtures[0].reentrant = True
    with pytest.raises(RuntimeError, match="got use_reentrant=True; expected use_reentrant=False"):
        model(x).sum().backward()


class Counted(Sparse):
    """The number of experts is written out in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.router(x).view(-1, 2, 3).sum((1, 2)).mean() * 0


class Blocks(nn.Module):
    """As many blocks as classes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 4)
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x).mean()
        for block in self.blocks:
            x = block(x).relu()
        return x + y


def test_what_is_no_mixture_is_refused() -> None:
    with pytest.raises(
        ValueError, match="experts: got True; expected False for this model: it has no mix"
    ):
        sparsify_(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), example_inputs=tokens(),
                  experts=True)  # fmt: skip
    for model in (Model(Counted), Blocks()):
        before = {name: id(one) for name, one in model.named_modules()}
        with pytest.raises(ValueError, match="does not run, or computes something else"):
            sparsify_(model, example_inputs=tokens(), experts=True)
        assert {name: id(one) for name, one in model.named_modules()} == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"experts": "yes"}, TypeError, "experts: got 'yes'; expected True or False"),
        ({"experts": True}, ValueError, "experts: got True; expected False without example_inputs"),
        (
            {"experts": True, "gates": "input", "example_inputs": tokens()},
            ValueError,
            "gates: got 'input'; expected 'auto' where experts=True",
        ),
        (
            {"experts": True, "noise": "example", "example_inputs": tokens()},
            ValueError,
            "noise: got 'example'; expected 'batch' where experts=True",
        ),
    ],
)
def test_bad_options_are_refused(options: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        sparsify_(Model(Dense), **options)


def test_gates_are_those_of_the_list() -> None:
    assert [i for i, one in enumerate(GATES) if one > -1.6] == KEPT
