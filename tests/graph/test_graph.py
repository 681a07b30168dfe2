"""The export: which nodes are whose calls, and whose weights are read elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.graph.capture import export, is_carrier, is_site
from l0fast.layers.handle import gated_layers


class ReadOutside(nn.Module):
    """Weights that are read without their layer being called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(6)
        self.body = nn.Sequential(nn.ReLU(), self.b)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.norm(self.a(x)))
        return y + nn.functional.linear(self.a.weight.sum(1), self.b.weight)


def test_calls_are_told_from_other_readers() -> None:
    trace = export(ReadOutside().eval(), Example.of(torch.randn(2, 3)))
    assert trace.counts == {"a": 1, "b": 1, "norm": 1}  # b by the first of its two names
    assert trace.read_outside == {"a", "b"}
    callers = {node.name: name for node, name in trace.callers.items()}
    assert callers["relu"] == "body.0"
    assert callers["add"] == ""
    assert {node.name for node in trace.inputs} == {"x"}


def test_what_runs_is_in_the_graph_whether_it_is_read_or_not() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            self.c(self.b(y).relu()).add(y)
            y.sigmoid()  # of no layer that nobody reads
            return self.d(y).neg_()

    trace = export(Unread().eval(), Example.of(torch.randn(2, 3)))
    assert trace.counts == {"a": 1, "b": 1, "c": 1, "d": 1}
    assert trace.unread == {"b", "c"}
    names = [node.name for node in trace.nodes if node.op == "call_function"]
    assert names == ["linear", "linear_1", "relu", "linear_2", "add", "linear_3", "neg_"]


def test_what_can_shrink() -> None:
    plain = [nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1, groups=2), nn.BatchNorm2d(2)]
    plain += [nn.ConvTranspose1d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1, groups=2)]
    assert [is_site(layer) for layer in plain] == [True] * 6
    assert [is_carrier(layer) for layer in plain] == [False, False, True, True, False, True]
    others: list[nn.Module] = [nn.ReLU(), nn.LayerNorm(2), nn.LazyConvTranspose2d(2, 1)]
    others.append(nn.BatchNorm2d(2, track_running_stats=False))
    assert not any(is_site(layer) for layer in others)


@dataclass
class Given:
    """An output that nobody has told PyTorch of."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    name: str = "given"
    inner: Any = None


class Giver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Given:
        x = torch.relu(self.first(x))
        y = torch.relu(self.second(x))
        return Given(self.head(y), (x,), inner=Given(x, ()))


def test_outputs_that_are_dataclasses_are_followed() -> None:
    model, x = Giver(), torch.randn(2, 3)
    export(model.eval(), Example.of(x))
    assert not model._forward_hooks
    sparsify_(model, example_inputs=x)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha[::2] = -9.0
    small: Any = prune(model, x)
    assert small.report.tier == "merged"
    assert small.head.in_features == 3
    given = small(x)
    assert isinstance(given, Given)
    assert [given.hidden[0].shape[1], given.inner.logits.shape[1]] == [8, 8]  # what is given stays
