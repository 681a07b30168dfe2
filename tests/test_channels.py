"""Every rule of the table tells the truth about the op it stands for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast.channels import RULES, VIEW_RULES, Flow, op_name, reshape, rule_for, shape_of

CONSTANT = (0.0, 0.75, -1.5)
"""What the first channels are everywhere; the others vary."""


class Op(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone())  # some write in place


def example(shape: tuple[int, ...], dim: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    for channel, value in enumerate(CONSTANT):
        x.select(dim, channel).fill_(value)
    return x


@functools.cache
def graph_of(function: Callable[[Tensor], Tensor], *shape: int) -> torch.fx.Graph:
    x = torch.zeros(shape, dtype=torch.float64)
    return torch.export.export(Op(function), (x,), strict=False).graph


def follow(function: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Flow | None:
    """The flow of function(x), from the graph and the table; None where it stops."""
    constant = torch.full((x.shape[dim],), math.nan, dtype=torch.float64)
    constant[: len(CONSTANT)] = torch.tensor(CONSTANT, dtype=torch.float64)
    flows: dict[Any, Flow | None] = {}
    last = None
    for node in graph_of(function, *x.shape).nodes:
        if node.op == "placeholder":
            flows[node] = Flow(dim, torch.arange(x.shape[dim]), constant)
        elif node.op == "call_function" and node.all_input_nodes:
            rule, flow = rule_for(node, RULES | VIEW_RULES), flows[node.all_input_nodes[0]]
            flows[node] = rule(node, flow) if rule and flow else None
            if flows[node] is not None:
                shape = shape_of(node)
                assert shape is not None
                assert shape[flows[node].dim] == len(flows[node].labels)  # type: ignore[union-attr]
        elif node.op == "output":
            last = flows[node.all_input_nodes[0]]
    return last


def assert_true(function: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> Flow:
    """What the flow says holds: constants are constant, labels say who depends on whom."""
    flow = follow(function, x, dim)
    assert flow is not None
    y = Op(function)(x).movedim(flow.dim, 0)
    assert len(y) == len(flow.labels) == len(flow.constant)
    for position, value in zip(y, flow.constant.tolist(), strict=True):
        if not math.isnan(value):
            torch.testing.assert_close(position, torch.full_like(position, value))
    for channel in range(len(CONSTANT), x.shape[dim]):
        other = x.clone()
        other.select(dim, channel).add_(torch.rand_like(other.select(dim, channel)) + 0.1)
        changed = (Op(function)(other).movedim(flow.dim, 0) != y).reshape(len(y), -1).any(1)
        assert bool((flow.labels[changed] == channel).all())
    return flow


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu in place": F.relu_,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 2.0),
    "hardtanh without 0": lambda x: F.hardtanh(x, 0.5, 2.0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "leaky_relu in place": lambda x: F.leaky_relu_(x, 0.2),
    "elu": F.elu,
    "elu in place": lambda x: F.elu(x, 0.7, inplace=True),
    "selu": F.selu,
    "celu": F.celu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid in place": torch.sigmoid_,
    "logsigmoid": F.logsigmoid,
    "softplus": F.softplus,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.1, 3.0),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "dropout1d": lambda x: F.dropout1d(x, 0.5, training=False),
    "times a number": lambda x: 3 * x,
    "by a number": lambda x: x / 3,
    "plus a number": lambda x: x + 1.5,
    "a number minus": lambda x: 1.5 - x,
    "minus in place": lambda x: x.sub_(0.75),
    "clamp": lambda x: x.clamp(-1, 0.5),
    "power": lambda x: x**2,
    "square": torch.square,
    "square root": lambda x: x.abs().sqrt(),
    "sine": torch.sin,
    "cosine": torch.cos,
    "error function": torch.erf,
    "at least": lambda x: x.clamp_min(-0.5),
    "at most": lambda x: x.clamp_max(0.5),
    "exp": torch.exp,
    "abs": torch.abs,
    "negative": torch.neg,
    "contiguous": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
    "detach": lambda x: x.detach(),
    "to": lambda x: x.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str) -> None:
    x = example((2, 5, 6), 1)
    flow = assert_true(ELEMENTWISE[name], x, 1)
    assert flow.dim == 1
    assert flow.labels.tolist() == [0, 1, 2, 3, 4]
    at_zero = float(ELEMENTWISE[name](torch.zeros(1, 1, 1, dtype=torch.float64)))
    assert float(flow.constant[0]) == pytest.approx(at_zero)  # f(0), not merely "unknown"
    assert flow.constant[3:].isnan().all()


SPATIAL: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "max_pool1d": (1, lambda x: F.max_pool1d(x, 2, padding=1)),
    "max_pool2d": (2, lambda x: F.max_pool2d(x, 2, padding=1)),
    "max_pool3d": (3, lambda x: F.max_pool3d(x, 2, padding=1)),
    "avg_pool1d": (1, lambda x: F.avg_pool1d(x, 2, padding=1)),
    "avg_pool2d": (2, lambda x: F.avg_pool2d(x, 2, padding=1)),
    "avg_pool3d": (3, lambda x: F.avg_pool3d(x, 2, padding=1)),
    "adaptive_avg_pool1d": (1, lambda x: F.adaptive_avg_pool1d(x, 2)),
    "adaptive_avg_pool2d": (2, lambda x: F.adaptive_avg_pool2d(x, 1)),
    "adaptive_avg_pool3d": (3, lambda x: F.adaptive_avg_pool3d(x, 2)),
    "adaptive_max_pool1d": (1, lambda x: F.adaptive_max_pool1d(x, 2)),
    "adaptive_max_pool2d": (2, lambda x: F.adaptive_max_pool2d(x, 2)),
    "adaptive_max_pool3d": (3, lambda x: F.adaptive_max_pool3d(x, 2)),
    "mean": (2, lambda x: x.mean((-2, -1))),
    "mean, dims kept": (2, lambda x: x.mean((2, 3), keepdim=True)),
    "mean of the batch": (1, lambda x: x.mean(0)),
    "zero padding": (2, lambda x: F.pad(x, (1, 2, 0, 1))),
    "padding with 3": (2, lambda x: F.pad(x, (1, 1), value=3.0)),
    "circular padding": (2, lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    "reflected padding": (2, lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "permute": (2, lambda x: x.permute(2, 0, -3, 3)),
    "transpose": (2, lambda x: x.transpose(1, -1)),
    "transpose others": (2, lambda x: x.transpose(0, -1)),
    "flatten": (2, lambda x: x.flatten(1)),
    "flatten spatial": (2, lambda x: x.flatten(2)),
    "flatten everything": (2, lambda x: x.flatten()),
    "flatten after transpose": (2, lambda x: x.transpose(1, 2).flatten(1)),
    "view": (2, lambda x: x.view(x.shape[0], -1)),
    "reshape": (2, lambda x: x.reshape(-1, x.shape[1] * 36)),
    "unflatten": (2, lambda x: x.unflatten(3, (2, 3))),
    "unsqueeze, squeeze": (2, lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(1)),
}


@pytest.mark.parametrize("name", SPATIAL)
@pytest.mark.parametrize("batch", [1, 2])
def test_dimensions(name: str, batch: int) -> None:
    spatial, function = SPATIAL[name]
    flow = assert_true(function, example((batch, 5, *[6] * spatial), 1), 1)
    zero = flow.constant[flow.labels == 0]
    assert bool((zero == 0).all()) == (name != "padding with 3")


def test_a_flatten_that_merges_what_is_outside_too() -> None:
    flow = assert_true(lambda x: x.flatten(1), example((2, 3, 5), 2), 2)
    assert flow.labels.tolist() == [0, 1, 2, 3, 4] * 3


def test_a_single_channel_merges_as_little_as_it_can() -> None:
    for shape, labels in (((2, 16), [0] * 16), ((2, 1, 4, 4), [0])):
        nodes = graph_of(lambda x, shape=shape: x.view(shape), 2, 1, 4, 4).nodes
        view = next(node for node in nodes if op_name(node) == "aten::view")
        flow = reshape(view, Flow(1, torch.tensor([0]), torch.zeros(1)))
        assert flow is not None
        assert (flow.dim, flow.labels.tolist()) == (1, labels)


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "channels split": lambda x: x.reshape(2, 4, 45),
    "channels merged and split": lambda x: x.flatten(1).view(2, 12, 15),
    "pooling over channels": lambda x: F.max_pool1d(x.flatten(2).transpose(1, 2), 2),
    "mean over channels": lambda x: x.mean(1),
    "mean over everything": lambda x: x.mean(),
    "padding channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "dropout in training": lambda x: F.dropout(x, 0.0, training=True),
    "a slice": lambda x: x[:, :3],
    "a tensor times a tensor": lambda x: x * torch.ones(1, 5, 1, 1),
    "a sum of two": lambda x: x + x.roll(1, 1),
    "indices of a pool": lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1].double(),
    "a number to the power of x": lambda x: 2**x,
}


@pytest.mark.parametrize("name", STOPS)
def test_what_cannot_be_followed_stops(name: str) -> None:
    assert follow(STOPS[name], example((2, 5, 6, 6), 1), 1) is None


def test_every_rule_is_tried() -> None:
    """The tables above use each op of the table, or its twin in place."""
    used: set[str] = set()
    cases = [(function, (2, 5, 6)) for function in ELEMENTWISE.values()]
    cases += [(function, (2, 5, *[6] * spatial)) for spatial, function in SPATIAL.values()]
    for function, shape in cases:
        used |= {op_name(node).removesuffix("_") for node in graph_of(function, *shape).nodes}
    named = {name.removesuffix("_") for name in RULES | VIEW_RULES}
    assert named - used == set()
