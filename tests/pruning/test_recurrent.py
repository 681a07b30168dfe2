"""RNN, GRU and LSTM layers lose the inputs that are gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    DensityConstraint,
    gates,
    load_pruned,
    param_groups,
    prune,
    prune_optimizer,
    save_pruned,
    sparsify_,
)
from l0fast.graph.calls import Example
from l0fast.measures.flops import count_macs
from l0fast.pruning.shrink import plan_removal, remove_
from tests.helpers.thinned import thinned_product

KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "without biases": {"bias": False},
}


class Heard(nn.Module):
    """Convolutions over time, a recurrent layer, a head."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(5, 16, 3, padding=1), nn.Conv1d(16, 12, 3, padding=1)
        self.recurrent = KINDS[kind](12, 8, batch_first=True, **options)
        self.head = nn.Linear(8 * (1 + options.get("bidirectional", False)), 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu()).relu().transpose(1, 2)
        return self.head(self.recurrent(y)[0])


class AfterLinear(nn.Module):
    """A recurrent layer that reads what a Linear makes of the model's inputs."""

    def __init__(self, used: str = "") -> None:
        super().__init__()
        self.used = used
        self.before, self.recurrent = nn.Linear(5, 12), nn.LSTM(12, 8)
        self.head = nn.Linear(8, 3)
        self.beside = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x).relu()
        if self.used == "its state":
            return self.head(self.recurrent(y, (y[:1, :, :8], y[:1, :, :8]))[0])
        given, _ = self.recurrent(y)
        if self.used == "twice":
            given = given + self.recurrent(y.flip(0))[0]
        if self.used == "beside":
            return self.head(given) + self.beside(y)
        return self.head(given)


def half_closed(model: nn.Module) -> None:
    for layer in gates(model).layers.values():
        with torch.no_grad():
            layer.log_alpha[::2], layer.log_alpha[1::2] = -30.0, 30.0


@pytest.mark.parametrize(("kind", "options"), thinned_product(3, KINDS, OPTIONS.values()))
def test_it_loses_the_inputs_that_are_gone(
    kind: str, options: dict[str, Any], tmp_path: Any
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7)
    model = sparsify_(Heard(kind, **options), example_inputs=x).double()
    half_closed(model)
    small: Any = prune(model, x.double())
    assert (small.recurrent.input_size, small.recurrent.weight_ih_l0.shape[1]) == (6, 6)
    fresh = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(small(fresh), model.eval()(fresh), rtol=1e-12, atol=1e-12)
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(lambda: Heard(kind, **options).double(), tmp_path / "small.safetensors")
    assert torch.equal(again(fresh), small(fresh))
    small(fresh).sum().backward()  # the weights that it computes with are its parameters
    assert small.recurrent.weight_ih_l0.grad.shape[1] == 6


@pytest.mark.parametrize(("kind", "measure"), thinned_product(2, KINDS, ["params", "macs"]))
def test_what_is_left_is_reckoned(kind: str, measure: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7)
    model = sparsify_(Heard(kind, bidirectional=True), example_inputs=x)
    constraint = DensityConstraint(model, 0.6, measure=measure, example_inputs=x)
    half_closed(model)
    small = prune(model, x)
    dense: nn.Module = Heard(kind, bidirectional=True)
    counts = [
        float(count_macs(one, x)[""])
        if measure == "macs"
        else float(sum(parameter.numel() for parameter in one.parameters()))
        for one in (small, dense)
    ]
    torch.testing.assert_close(constraint.densities().item(), counts[0] / counts[1])


def test_all_of_an_lstm_is_counted() -> None:
    lstm, x = nn.LSTM(12, 8, num_layers=2, bidirectional=True), torch.randn(7, 3, 12)
    by_hand = 7 * 3 * 2 * 4 * 8 * (12 + 8) + 7 * 3 * 2 * 4 * 8 * (16 + 8)
    assert count_macs(lstm, x)[""] == by_hand


@pytest.mark.parametrize("used", ["", "its state", "twice", "beside"])
def test_a_linear_before_it_has_gates_on_its_outputs(used: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5)
    model = sparsify_(AfterLinear(used), example_inputs=x).double()
    before = gates(model).layers.get("before")
    goes = used in ("", "beside")
    assert (before is not None and before.gates == "output") == goes
    half_closed(model)
    small: Any = prune(model, x.double())
    assert small.recurrent.input_size == (6 if goes else 12)
    fresh = torch.randn(9, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(small(fresh), model.eval()(fresh), rtol=1e-12, atol=1e-12)


def test_a_training_goes_on_with_less() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7)
    model: Any = sparsify_(Heard("LSTM"), example_inputs=x)
    adam = torch.optim.Adam(param_groups(model, lr=1e-2))

    def step(one: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        one(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(model, adam)
    half_closed(model)
    small = prune(model, x)
    step(small, prune_optimizer(adam, model, small))
    kept = {name: layer.log_alpha.detach() > 0 for name, layer in gates(model).layers.items()}
    removal, _ = plan_removal(model, Example.of(x), kept)
    assert removal is not None
    remove_(model, removal, Example.of(x), False, adam)
    assert model.recurrent.input_size == 6
    weight = model.recurrent.weight_ih_l0
    assert adam.state[weight]["exp_avg"].shape == weight.shape == (32, 6)
    before = weight.detach().clone()
    step(model, adam)
    assert not torch.equal(weight, before)


class Packed(AfterLinear):
    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((x.shape[1],), len(x))
        packed = nn.utils.rnn.pack_padded_sequence(self.before(x).relu(), lengths)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0])[0])


@pytest.mark.filterwarnings("ignore:sparsify_. each layer has gates by itself")
def test_packed_sequences_keep_their_width() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 3, 5)
    model = sparsify_(Packed(), example_inputs=x).double()
    half_closed(model)
    small: Any = prune(model, x.double())
    assert small.recurrent.input_size == 12
    fresh = torch.randn(7, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(small(fresh), model.eval()(fresh), rtol=1e-12, atol=1e-12)


class Behind(Heard):
    """What a batch norm, a view of channels and frequencies, or a projection is beside."""

    def __init__(self, kind: str) -> None:
        super().__init__("LSTM", **({"proj_size": 4} if kind == "projection" else {}))
        self.kind = kind
        self.norm = nn.BatchNorm1d(12)
        self.image = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Linear(4 if kind == "projection" else 8, 3)
        self.wide = nn.GRU(3 * 5, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "view":
            seen = self.image(x[:, None]).relu().permute(0, 3, 1, 2).flatten(2)
            return self.head(self.wide(seen)[0])
        y = self.second(self.first(x).relu())
        y = self.norm(y) if self.kind == "norm" else y
        return self.head(self.recurrent(y.relu().transpose(1, 2))[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("kind", "left"), [("norm", 12), ("view", 5), ("projection", 6)])
def test_what_is_around_it(kind: str, left: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 7)
    model: Any = sparsify_(Behind(kind).eval(), example_inputs=x).double()
    for tensor in (model.norm.weight, model.norm.bias, model.norm.running_mean):
        nn.init.normal_(tensor)
    half_closed(model)
    small: Any = prune(model, x.double())
    recurrent = small.wide if kind == "view" else small.recurrent
    assert recurrent.input_size == left
    fresh = torch.randn(2, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(small(fresh), model.eval()(fresh), rtol=1e-12, atol=1e-12)
