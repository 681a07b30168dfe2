"""Other log_alphas for a while, and then their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l0fast import sparsify_
from l0fast.layers.expected import expected_open
from l0fast.layers.gated_types import GATED_TYPES
from l0fast.layers.handle import gated_layers, own_gates
from l0fast.layers.substitute import with_log_alpha


def three() -> tuple[nn.Module, dict[str, Any]]:
    """Two layers that share their gates, and one with its own."""
    model: Any = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 2), "c": nn.Linear(3, 2)})
    gated = GATED_TYPES[nn.Linear]
    model["a"] = gated.from_dense(model["a"])
    model["b"] = gated.from_dense(model["b"], shared=model["a"])
    model["c"] = gated.from_dense(model["c"])
    return model, gated_layers(model)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_layers_have_others_inside_and_their_own_afterwards(
    error: type[BaseException] | None,
) -> None:
    model, layers = three()
    before = {name: id(one) for name, one in model.named_parameters(remove_duplicate=False)}
    values = {name: torch.full_like(layers[name].log_alpha, -9.0) for name in own_gates(layers)}
    assert list(values) == ["a", "c"]

    def inside() -> None:
        with with_log_alpha(layers, values):
            assert layers["a"].log_alpha is layers["b"].log_alpha
            assert layers["a"].log_alpha is not layers["c"].log_alpha
            assert isinstance(layers["c"].log_alpha, nn.Parameter)
            for layer in layers.values():
                assert layer.log_alpha.tolist() == [-9.0] * layer.num_gates
                assert float(layer.evaluation_gates().detach().sum()) == 0.0
            if error is not None:
                raise error("inside")

    if error is None:
        inside()
    else:
        with pytest.raises(error, match="inside"):
            inside()
    after = {name: id(one) for name, one in model.named_parameters(remove_duplicate=False)}
    assert after == before
    assert all(float(layer.evaluation_gates().detach().sum()) > 0 for layer in layers.values())


def test_layers_that_are_not_named_keep_their_own() -> None:
    _, layers = three()
    own = layers["c"].log_alpha
    with with_log_alpha(layers, {"b": torch.full((4,), -9.0)}):
        assert layers["a"].log_alpha.tolist() == layers["b"].log_alpha.tolist() == [-9.0] * 4
        assert layers["c"].log_alpha is own


def test_draws_are_of_the_log_alpha_that_they_were_drawn_from() -> None:
    torch.manual_seed(0)
    model = sparsify_(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))
    layers = gated_layers(model)
    model(torch.randn(1, 4))
    versions = {layer.log_alpha._version for layer in layers.values()}
    others = {name: torch.empty_like(one.log_alpha).fill_(40.0) for name, one in layers.items()}
    with with_log_alpha(layers, others):
        # Changed as often as their own: only what has been forgotten tells them apart.
        assert {layer.log_alpha._version for layer in layers.values()} == versions
        assert expected_open(list(layers.values())).tolist() == [4.0, 3.0]
        model(torch.randn(1, 4))
    found = expected_open(list(layers.values()))
    torch.testing.assert_close(found, torch.tensor([0.9 * 4, 0.9 * 3]))
    found.sum().backward()
    assert all(bool((layer.log_alpha.grad != 0).all()) for layer in layers.values())
