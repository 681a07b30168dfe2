"""What sparsify_ and its models refuse in a sentence, and leave as it was."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0fast
from l0fast import DensityConstraint, L0Penalty, gates, prune, sparsify_
from l0fast.layers.handle import handle_of
from tests.helpers.plain_models import DataDependent
from tests.helpers.thinned import telling

X = torch.randn(4, 6)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = DataDependent()
    handle = model.register_forward_pre_hook(lambda *_: None)
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=r"^skip: got True; expected .auto. or False for"):
        sparsify_(model, gates="input", example_inputs=X, skip=True)
    assert {name: (type(m), dict(vars(m))) for name, m in model.named_modules()} == before
    assert handle_of(model) is None
    handle.remove()
    assert not model._forward_pre_hooks


def test_without_a_structure_there_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"^sparsify_: each layer has gates by itself: torch.exp"):
        sparsify_(DataDependent(), example_inputs=X)


def test_threads_get_the_gates_that_one_gets() -> None:
    def places() -> dict[str, int]:
        layers = gates(sparsify_(net(), example_inputs=X)).layers
        return {name: layer.log_alpha.numel() for name, layer in layers.items()}

    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(places())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [places()] * 6


def test_a_weight_that_is_nan_proves_nothing() -> None:
    model: Any = sparsify_(net(), example_inputs=X)
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^model\.0\.weight: got 'NaN'; expected weights"):
        prune(model, X)


@pytest.mark.parametrize("build", [net, lambda: nn.Sequential(nn.Linear(6, 1))])
def test_all_gates_on_single_weights_may_be_closed(build: Callable[[], nn.Module]) -> None:
    model = sparsify_(build(), gates="weight", example_inputs=X)
    constraint = DensityConstraint(model, 0.5)
    with torch.no_grad():
        for layer in gates(model).layers.values():
            layer.log_alpha.fill_(-5.0)
    small: Any = prune(model, X, constraint)
    assert small.report.density == 0.0


def test_a_strict_state_has_every_log_alpha() -> None:
    model = sparsify_(net(), example_inputs=X)
    name = next(iter(gates(model).layers))
    state = {k: v for k, v in model.state_dict().items() if k != f"{name}.log_alpha"}
    with pytest.raises(RuntimeError, match=rf"Missing key.*\"{name}\.log_alpha\""):
        model.load_state_dict(state)
    dense = net().state_dict()
    model.load_state_dict(dense)  # the gates then stay as they are


@pytest.mark.parametrize(
    "call",
    [
        lambda: gates(None),  # type: ignore[arg-type]
        lambda: prune(None, X),  # type: ignore[arg-type]
        lambda: DensityConstraint(None, 0.5),  # type: ignore[arg-type]
        lambda: l0fast.param_groups(None, lr=1.0),  # type: ignore[arg-type]
    ],
)
def test_none_is_no_model(call: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match=r"^model: got 'NoneType'; expected a torch.nn.Module$"):
        call()


def test_a_layer_without_weights_is_named() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 3))
    with pytest.raises(
        ValueError, match=r"^model\.0: got 'no weights'; expected layers with weigh"
    ):
        sparsify_(model, example_inputs=X)


@pytest.mark.parametrize(
    "kind", telling(["constraint", "attached", "penalty"], ["attached", "penalty"])
)
def test_new_gates_beside_a_constraint_are_refused(kind: str) -> None:
    """It was built for the gates of before: the new ones would be trained towards no target."""
    model = sparsify_(net(), include=["0"], example_inputs=X)
    term = L0Penalty(model, 0.1) if kind == "penalty" else DensityConstraint(model, 0.5, steps=300)
    if kind == "attached":
        term.attach(torch.optim.Adam(l0fast.param_groups(model, 1e-3, steps=300)))
    before = [(name, type(part)) for name, part in model.named_modules()]
    for of, names in ((model, ["2"]), (nn.Sequential(model, nn.Linear(3, 2)), None)):
        with pytest.raises(ValueError, match=f"^sparsify_: the model has a {type(term).__name__},"):
            sparsify_(of, include=names, example_inputs=X)
    assert [(name, type(part)) for name, part in model.named_modules()] == before
    sparsify_(model, dry_run=True)
    if kind == "attached":
        term.detach()
    del term
    sparsify_(model, include=["2"], example_inputs=X)
    assert list(gates(model).layers) == ["0", "2"]
    sparsify_(model, example_inputs=X)  # adds none


def test_a_functional_transform_of_a_training_step_is_refused() -> None:
    model = sparsify_(net(), example_inputs=X)
    parameters = dict(model.named_parameters())

    def loss(parameters: Any) -> Tensor:
        return torch.func.functional_call(model, parameters, (X,)).sum()

    with pytest.raises(RuntimeError, match=r"^torch\.func: got a transform of a training step"):
        torch.func.grad(loss)(parameters)
