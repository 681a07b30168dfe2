"""A model is exported once, and again only when it has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, prune, sparsify_
from l0fast.graph import structure
from l0fast.graph.calls import Example
from l0fast.graph.structure import Structure, fingerprint, structure_of
from l0fast.layers.handle import gated_layers, gates
from l0fast.layers.stages import SETTLED


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.repeats = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        for _ in range(self.repeats):
            x = x + 1
        return self.c(x)


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Structure]:
    """Every structure that is made."""
    made: list[Structure] = []
    original = Structure.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, *args: Any) -> Structure:
        made.append(original(cls, *args))
        return made[-1]

    monkeypatch.setattr(structure.Structure, "of", classmethod(of))
    return made


X = torch.randn(4, 6)


def test_one_export_serves_everything(exports: list[Structure]) -> None:
    model = sparsify_(Net(), example_inputs=X, skip=True)
    for measure in ("params", "macs", "memory"):
        constraint = DensityConstraint(model, 0.5, measure=measure, example_inputs=X)
        (model(X).sum() + constraint()).backward()
    prune(model, X)
    assert len(exports) == 1
    assert gates(model).structure is exports[0]


def test_gates_and_weights_do_not_change_it(exports: list[Structure]) -> None:
    model = sparsify_(Net(), example_inputs=X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    for layer in gated_layers(model).values():
        layer.stage = SETTLED
    structure_of(model.eval(), Example.of(torch.zeros(4, 6)))
    assert len(exports) == 1


@pytest.mark.parametrize("change", ["example", "module", "size", "attribute"])
def test_what_changes_it(exports: list[Structure], change: str) -> None:
    model: Any = sparsify_(Net(), example_inputs=X)
    x = torch.zeros(2, 6) if change == "example" else X
    if change == "module":
        model.b = nn.Sequential(model.b, nn.Tanh())
    if change == "size":
        model.c = nn.Linear(8, 5)
    if change == "attribute":
        model.repeats = 2
    assert structure_of(model, Example.of(x)) is exports[1]
    assert structure_of(model, Example.of(x)) is exports[1]
    assert len(exports) == 2


def test_it_leaves_the_model_as_it_was() -> None:
    model: Any = sparsify_(Net(), example_inputs=X, skip=False)
    model.b.eval()
    before = [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()]
    gates(model).structure = None
    structure_of(model, Example.of(X))
    assert [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()] == before


def test_gates_do_not_show_in_a_fingerprint() -> None:
    plain = Net()
    before = fingerprint(plain, Example.of(X))
    assert fingerprint(sparsify_(plain, example_inputs=X), Example.of(X)) == before
