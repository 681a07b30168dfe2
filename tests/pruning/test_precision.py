"""The proof in little memory: weights are float64 only while their module runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.pruning.precision import holders_that_run, in_precision


class Net(nn.Module):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.parts = nn.ParameterList([nn.Parameter(torch.ones(8))])
        self.a, self.norm, self.b = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.seen: list[tuple[torch.dtype, int]] = []

    def wide(self) -> int:
        return sum(p.dtype == torch.float64 for p in self.parameters())

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        x = self.norm(self.a(x)) * self.scale * self.parts[0]
        self.seen.append((x.dtype, self.wide()))
        return self.b(x.relu())


X = torch.randn(4, 6)


def test_each_weight_is_wide_while_its_module_runs() -> None:
    model = Net().eval()
    holders = holders_that_run(model, Example.of(X))
    # What a list holds, its owner reads.
    assert holders == {"": "", "parts": "", "a": "a", "norm": "norm", "b": "b"}
    model.seen.clear()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad(), in_precision(model, torch.float64, holders):
        out = model(X.double())
        assert model.wide() == 0
    assert out.dtype == torch.float64
    assert model.seen == [(torch.float64, 2)]  # scale and parts[0], of the module that runs
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(out.float(), model(X))


def test_everything_is_put_back_after_an_error() -> None:
    model = Net().eval()
    holders = holders_that_run(model, Example.of(X))
    with pytest.raises(RuntimeError, match="dtype"), in_precision(model, torch.float64, holders):
        model(X)  # of another dtype
    assert model.wide() == 0
    assert int(model.calls) == 1  # of the look at which modules run
    model(X)


class Tied(nn.Module):
    """Reads a layer's weight in another module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).sum(-1) + F.linear(x, self.a.weight).sum(-1)


class OwnFloats(nn.Module):
    """Its forward makes tensors of float32, by default and by name, beside what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        hidden, places = torch.zeros(len(x), 8), torch.arange(8).float()
        mixing = torch.eye(8, dtype=torch.float32)
        for _ in range(2):
            hidden = torch.matmul((self.a(x) + hidden + places).relu(), mixing)
        return self.b(hidden)


@pytest.mark.parametrize("build", [Net, Tied, OwnFloats])
def test_the_proof_is_of_float64_and_leaves_no_trace(build: Any) -> None:
    model: Any = sparsify_(build(), include="b", gates="input", example_inputs=X).eval()
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.copy_(torch.randn(layer.log_alpha.shape) * 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    small: Any = prune(model, X)
    assert small.report.tolerance == 1e-10
    assert small.report.max_error <= 1e-10
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in theirs for p in small.parameters())
    torch.testing.assert_close(small(X), model(X))


class Keeps(nn.Module):
    """Refers to a parameter in a list, and writes into one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.decayed = [self.b.bias]
        self.log: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(x)
        return self.b(self.a(x).relu())


def test_what_a_module_keeps_in_lists_is_its_own() -> None:
    model: Any = sparsify_(Keeps(), example_inputs=X, skip=True)
    model.log.append(X)
    small: Any = prune(model, X)
    assert len(model.log) == len(small.log) == 1
    assert small.decayed[0] is not model.b.bias
    assert small.decayed[0].data_ptr() != model.b.bias.data_ptr()
