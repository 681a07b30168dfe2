"""The draft of a pruned model: attempts after one another, each from the full model."""

from __future__ import annotations

from typing import Any

import torch

from l0fast import sparsify_
from l0fast.layers.handle import gates
from l0fast.pruning.draft import Draft
from l0fast.pruning.edits import Edit
from l0fast.pruning.gate_values import GateValues, all_gates
from tests.helpers.plain_models import mlp


def edit(name: str, inputs: list[int]) -> Edit:
    size = {"0": (6, 8), "2": (8, 4)}[name]
    return Edit(name, "Linear", size, tuple(inputs), None, (tuple(inputs), size[0]), None, None)


def test_a_layer_is_made_anew_where_its_edit_or_its_constants_are_others() -> None:
    torch.manual_seed(0)
    model = sparsify_(mlp(6, 8, 4), gates="input")
    layers = gates(model).layers
    draft = Draft(model, GateValues(layers, all_gates(layers)))
    x = torch.randn(3, 6)

    def attempt(edits: list[Edit], **constants: Any) -> tuple[Any, Any]:
        draft.make_smaller(edits, (), constants)
        return draft.model.get_submodule("0"), draft.model.get_submodule("2")

    first, second = [edit("0", [1, 3]), edit("2", [0, 5])]
    zero, two = attempt([first, second])
    expected = draft.model(x)
    assert attempt([first, second]) == (zero, two)
    other = attempt([first, edit("2", [0, 6])])
    assert other[0] is zero
    assert other[1] is not two
    assert attempt([first])[1] is not other[1]
    again = attempt([first, second])
    assert again[0] is zero
    assert again[1] is not two  # only what was made last is kept
    assert torch.equal(draft.model(x), expected)
    constants = torch.tensor([0.0, 1.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)
    folded = attempt([first, second], **{"2": constants})
    assert folded[0] is zero
    assert folded[1] is not again[1]
    assert attempt([first, second], **{"2": constants.clone()}) == folded
    assert attempt([first, second], **{"2": 2 * constants})[1] is not folded[1]
    assert not torch.equal(draft.model(x), expected)
    draft.undo()
    assert draft.model.get_submodule("0").in_features == 6
    assert attempt([first, second])[0] is zero
    assert torch.equal(draft.model(x), expected)
