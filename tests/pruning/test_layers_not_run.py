"""Layers that the example does not reach in evaluation: heads of training, heads by argument."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.pruning.shrink import plan_removal, remove_


class Heads(nn.Module):
    """A second head in training, and a third one where an argument asks for it."""

    def __init__(self, viewed: bool = False) -> None:
        super().__init__()
        self.viewed = viewed
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.head = nn.Conv2d(16, 12, 3, padding=1), nn.Linear(12, 4)
        self.aux_norm = nn.BatchNorm2d(16)
        self.aux = nn.Sequential(
            *(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )
        self.other = nn.Linear(12, 4)

    def forward(self, x: Tensor, other: bool = False) -> Any:
        h = torch.relu(self.norm(self.a(x)))
        y = torch.relu(self.b(h)).mean((2, 3))
        out = self.other(y) if other else self.head(y)
        if not self.training:
            return out
        h = self.aux_norm(h)
        return out, self.aux(h.view(-1, 16, *x.shape[2:]) if self.viewed else h)


def closed(model: nn.Module, x: Tensor) -> Any:
    sparsify_(model.double().eval(), example_inputs=x)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(5.0)
            layer.log_alpha[1::2] = -9.0
    return model


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 8, 8, dtype=torch.float64)


def test_a_head_of_training_loses_what_it_reads_with_the_others(x: Tensor) -> None:
    model = closed(Heads(), x)
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small.report.tier == "merged"
    assert (small.aux_norm.num_features, small.aux[0].in_channels, small.aux[0].groups) == (8, 8, 8)
    assert (small.aux[1].in_channels, small.aux[1].out_channels) == (8, 8)
    rows = {row["name"]: row for row in small.report.sites}
    assert rows["aux.1"]["in"] == [8, 16]
    assert "does not run in evaluation" in rows["aux.1"]["reason"]
    # It reads what is left: the rows of the units that stay.
    assert small.aux[1].weight.equal(model.aux[1].weight[:, ::2])
    small.train()
    assert [tuple(part.shape) for part in small(x)] == [(3, 4), (3, 4)]
    torch.stack([part.sum() for part in small(x)]).sum().backward()


def test_where_a_head_of_training_cannot_follow_the_units_stay(x: Tensor) -> None:
    model = closed(Heads(viewed=True), x)
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small.aux[1].in_channels == 16
    small.train()
    assert [tuple(part.shape) for part in small(x)] == [(3, 4), (3, 4)]
    assert any("merged: undone, RuntimeError" in note for note in small.report.notes)


def test_a_layer_that_never_runs_is_named(x: Tensor) -> None:
    small: Any = prune(closed(Heads(), x), x)
    (note,) = small.report.notes
    assert note.startswith("not run on the example, and so left as they are: other;")
    whole: Any = prune(sparsify_(Heads().double().eval(), example_inputs=x, density_init=1.0), x)
    assert whole.report.notes == []


def test_a_model_that_shrinks_in_training_goes_on_training(x: Tensor) -> None:
    model = closed(Heads(), x)
    masked = copy.deepcopy(model)
    kept = {name: layer.log_alpha > 0 for name, layer in gated_layers(model).items()}
    removal, _ = plan_removal(model, Example.of(x), kept)
    assert removal is not None
    remove_(model, removal, Example.of(x), False)
    assert model.aux[1].in_channels == 8
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)
    model.train()
    assert [tuple(part.shape) for part in model(x)] == [(3, 4), (3, 4)]


def test_a_model_that_wants_more_in_training_is_pruned_as_before(x: Tensor) -> None:
    class Labels(Heads):
        def forward(self, x: Tensor, other: bool = False) -> Any:
            if self.training:
                raise ValueError("labels are wanted")
            return super().forward(x, other)

    small: Any = prune(closed(Labels(), x), x)
    assert small.report.tier == "merged"
    assert "aux_norm, aux.0, aux.1" in small.report.notes[0]
