"""An explicit loop whose gates are not trained, or not fast enough, is told early."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0fast import DensityConstraint, gates, param_groups
from tests.helpers.gated import gated_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, START = 300, 20
X, Y = torch.randn(64, 12), torch.randint(3, (64,))
Make = Callable[[nn.Module], torch.optim.Optimizer]


def run(make: Make, steps: int) -> None:
    torch.manual_seed(0)
    model = gated_mlp(12, 200, 3, mean=2.0)
    constraint = DensityConstraint(model, 0.25, steps=STEPS, start=START / STEPS)
    optimizer = make(model)
    for _ in range(START + steps):
        (F.cross_entropy(model(X), Y) + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()


def frozen(model: nn.Module) -> torch.optim.Optimizer:
    for gate in gates(model).parameters():
        gate.requires_grad_(False)
    return torch.optim.AdamW(model.parameters(), 1e-3)


def without_gates(model: nn.Module) -> torch.optim.Optimizer:
    own = [p for name, p in model.named_parameters() if "log_alpha" not in name]
    return torch.optim.AdamW(own, 1e-3)


@pytest.mark.parametrize("make", [frozen, without_gates])
def test_gates_that_do_not_move_are_told_after_ten_steps(make: Make) -> None:
    with pytest.warns(UserWarning, match="no gate has changed in 10 steps") as seen:
        run(make, 40)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make, 9)


SLOW: dict[str, Make] = {
    "the rate of the weights": lambda model: torch.optim.AdamW(model.parameters(), 1e-3),
    "SGD": lambda model: torch.optim.SGD(param_groups(model, 0.1, steps=STEPS)),
    "groups without steps": lambda model: torch.optim.AdamW(param_groups(model, 1e-3)),
}


@pytest.mark.parametrize("name", SLOW)
def test_gates_that_move_too_slowly_are_told(name: str) -> None:
    with pytest.warns(UserWarning, match=r"after 30 of 300 steps the density is 0\.\d+ above"):
        run(SLOW[name], 60)


def test_gates_at_their_own_rate_are_not_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(lambda model: torch.optim.AdamW(param_groups(model, 1e-3, steps=STEPS)), STEPS)


def train(
    model: nn.Module, constraint: DensityConstraint, attached: bool, weights: bool = True
) -> None:
    groups = param_groups(model, 1e-3, steps=STEPS)
    optimizer = torch.optim.AdamW(groups if weights else groups[1:])
    if attached:
        constraint.attach(optimizer)
    for _ in range(30):
        loss = F.cross_entropy(model(X), Y)
        (loss if attached else loss + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            constraint.step()


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("one_of", ["model", "constraint"])
def test_a_copy_that_is_trained_in_place_of_the_model_is_told(one_of: str, attached: bool) -> None:
    model = gated_mlp(12, 200, 3, mean=2.0)
    constraint = DensityConstraint(model, 0.25, steps=STEPS, start=0.02)
    if one_of == "model":
        model = copy.deepcopy(model)
    else:
        constraint = copy.deepcopy(constraint)
    with pytest.warns(UserWarning, match="no weight of its model has changed in 10 steps") as seen:
        train(model, constraint, attached)
    assert len(seen) == 1


@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_of_both_and_gates_on_weights_in_no_optimizer_are_trained(attached: bool) -> None:
    model = gated_mlp(12, 200, 3, mean=2.0)
    model, constraint = copy.deepcopy(
        (model, DensityConstraint(model, 0.25, steps=STEPS, start=0.02))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, constraint, attached)
    alone = gated_mlp(12, 200, 3, mean=2.0)
    constraint = DensityConstraint(alone, 0.25, steps=STEPS, start=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(alone, constraint, attached, weights=False)
