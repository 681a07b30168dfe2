"""Training on: the pruned model's optimizer and averages are the parts of the gated model's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.helpers.plain_models as plain
from l0fast import param_groups, prune, prune_optimizer, prune_state_dict, sparsify_
from l0fast.layers.handle import gated_layers

Build = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Build] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD, no momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}
X = torch.randn(4, 1, 28, 28, dtype=torch.float64)
Y = torch.tensor([1, 2, 3, 4])


def trained(build: Build) -> tuple[Any, torch.optim.Optimizer]:
    """A gated LeNet after three steps, in which gates are fully open, or closed."""
    model: Any = sparsify_(plain.small_lenet().double())
    with torch.no_grad():
        for layer in gated_layers(model).values():
            shut = torch.rand(layer.log_alpha.shape) < 0.4
            shut[0] = False
            layer.log_alpha.copy_(torch.where(shut, -100.0, 100.0))
    optimizer = build(param_groups(model, 0.1, weight_decay=0.01))
    for _ in range(3):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_next_steps_are_those_of_the_gated_model(kind: str) -> None:
    model, optimizer = trained(OPTIMIZERS[kind])
    small: Any = prune(model, X)
    assert small.report.params[0] < 0.5 * small.report.params[1]
    assert isinstance(small.fc1, nn.Sequential)  # one of the layers has a gather before it
    before = copy.deepcopy(optimizer.state_dict())
    carried = prune_optimizer(optimizer, model, small)
    assert type(carried) is type(optimizer)
    assert [len(group["params"]) for group in carried.param_groups] == [8, 0]
    for group, other in zip(carried.param_groups, optimizer.param_groups, strict=True):
        assert {**group, "params": 0} == {**other, "params": 0}
    small.train()
    for _ in range(2):
        step(small, carried)
    for key, value in before["state"].items():  # the old one is as it was
        for name, part in value.items():
            torch.testing.assert_close(optimizer.state_dict()["state"][key][name], part)
    for _ in range(2):
        step(model, optimizer)
    wanted = prune_state_dict(model.state_dict(), model, small)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-11, atol=1e-13)


def test_an_average_of_the_weights() -> None:
    model, _ = trained(OPTIMIZERS["SGD"])
    with torch.no_grad():
        model.fc2.log_alpha.normal_()  # some are in between
    small: Any = prune(model, X)
    whole = prune_state_dict(model.state_dict(), model, small)
    assert whole.keys() == small.state_dict().keys()
    for name, value in small.state_dict().items():
        assert torch.equal(whole[name], value), name
    half = {
        name: value if name.endswith("log_alpha") else value / 2
        for name, value in model.state_dict().items()
    }
    dense = {name: value for name, value in half.items() if not name.endswith("log_alpha")}
    for state in (half, dense):  # a dense state gets the model's gates
        found = prune_state_dict(state, model, small)
        for name, value in small.state_dict().items():
            torch.testing.assert_close(
                found[name], value / 2 if value.is_floating_point() else value
            )
    small.load_state_dict(found)


def test_what_is_pruned_twice() -> None:
    model, _ = trained(OPTIMIZERS["SGD"])
    small: Any = sparsify_(prune(model, X))
    with torch.no_grad():
        for layer in gated_layers(small).values():
            layer.log_alpha.fill_(100.0)
            layer.log_alpha[1::2] = -100.0
    optimizer = OPTIMIZERS["SGD"](param_groups(small, 0.1))
    step(small, optimizer)
    smaller: Any = prune(small, X)
    carried = prune_optimizer(optimizer, small, smaller)
    step(smaller.train(), carried)
    step(small, optimizer)
    wanted = prune_state_dict(small.state_dict(), small, smaller)
    for name, value in smaller.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-11, atol=1e-13)


def test_a_tied_weight_stays_one() -> None:
    model: Any = sparsify_(plain.Tied().double(), include="hidden")
    tokens = torch.randint(11, (2, 5))
    with torch.no_grad():
        model.hidden.log_alpha.copy_(torch.tensor([100.0] * 5 + [-100.0] * 3))
    optimizer = OPTIMIZERS["Adam"](param_groups(model, 0.1))
    model(tokens).sum().backward()
    optimizer.step()
    small: Any = prune(model, tokens)
    carried = prune_optimizer(optimizer, model, small)
    assert {id(p) for p in carried.param_groups[0]["params"]} == {id(p) for p in small.parameters()}
    assert len(carried.state) == len(list(small.parameters()))


def test_refusals() -> None:
    model, optimizer = trained(OPTIMIZERS["SGD"])
    small = prune(model, X)
    other = prune(sparsify_(plain.LeNet(5, 10, 30).double()), X)
    with pytest.raises(ValueError, match=r"^small: got 'LeNet'; expected the model that prune"):
        prune_optimizer(optimizer, model, other)
    with pytest.raises(ValueError, match=r"^small: got 'LeNet'; expected the model that prune"):
        prune_optimizer(optimizer, model, plain.small_lenet())
    with pytest.raises(TypeError, match=r"^optimizer: got 'dict'; expected a torch.optim.Opt"):
        prune_optimizer({}, model, small)  # type: ignore[type-var]
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match=r"^optimizer: got 'a parameter of shape \(3,\)'; expec"):
        prune_optimizer(foreign, model, small)
    optimizer.state[model.fc2.weight]["factor"] = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"^optimizer: got 'SGD'; expected numbers and tensors"):
        prune_optimizer(optimizer, model, small)
    state: dict[str, Tensor] = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"^state_dict: got '1 tensors'; expected a state of the"):
        prune_state_dict(state, model, small)


def test_a_state_is_refused_where_biases_hold_constants() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    sparsify_(model, gates="output", include="0", example_inputs=x)
    with torch.no_grad():
        model[0].log_alpha[:4] = -9.0  # type: ignore[index]
    small = prune(model.eval(), x)
    with pytest.raises(ValueError, match=r"small: got .a model with constants in the bias of '2'"):
        prune_state_dict(model.state_dict(), model, small)
