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

from l0fast.graph.channels import IGNORED, JOINS, RULES, rule_for
from l0fast.graph.nodes import op_name, shape_of
from l0fast.graph.units import Units, unknown
from tests.helpers.thinned import thinned_product

CONSTANT = (0.0, 0.75, -1.5)
"""What the first channels are everywhere; the others vary."""


class Op(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x.clone())  # some write in place


class Groups:
    """The ties that rules ask for: a class for each label, 0 for what must stay."""

    def __init__(self, size: int) -> None:
        self.classes = torch.arange(size)

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        assert reason.startswith("aten::")
        for pair in zip(
            *(t.flatten() for t in torch.broadcast_tensors(first, second)), strict=True
        ):
            one, other = (self.classes[label].clone() for label in pair)
            self.classes[self.classes == torch.maximum(one, other)] = torch.minimum(one, other)

    def pin(self, labels: Tensor, reason: str) -> None:
        self.tie(labels, torch.tensor(0), reason)

    def together(self, first: Tensor, second: Tensor) -> Tensor:
        return self.classes[first] == self.classes[second]

    def is_held(self, labels: Tensor) -> bool:
        return False


def example(shape: tuple[int, ...], dim: int) -> Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    for channel, value in enumerate(CONSTANT):
        x.select(dim, channel).fill_(value)
    return x


@functools.cache
def graph_of(function: Callable[[Tensor], Tensor], *shape: int) -> torch.fx.Graph:
    x = torch.zeros(shape, dtype=torch.float64)
    return torch.export.export(Op(function), (x,), strict=False).graph


def follow(
    function: Callable[[Tensor], Tensor], x: Tensor, dim: int
) -> tuple[Units, Tensor] | None:
    """The units of function(x) and their classes, from the table; None where it stops.

    Channel c has the label 1 + c.
    """
    size = x.shape[dim]
    place = [-1 if other == dim else 1 for other in range(x.dim())]
    constant = torch.full((size,), math.nan, dtype=torch.float64)
    constant[: len(CONSTANT)] = torch.tensor(CONSTANT, dtype=torch.float64)
    vectors = (
        vector.view(place).expand(x.shape) for vector in (torch.arange(1, size + 1), constant)
    )
    begin, ties = Units(*vectors), Groups(size + 1)
    units: dict[Any, Any] = {}
    for node in graph_of(function, *x.shape).nodes:
        if node.op == "placeholder":
            units[node] = begin if node.name == "x" else unknown(shape_of(node) or ())
        elif op_name(node) == "getitem":
            units[node] = units[node.args[0]][node.args[1]]
        elif node.op == "call_function" and not node.all_input_nodes:
            units[node] = unknown(shape_of(node) or ())
        elif node.op == "call_function" and op_name(node) not in IGNORED:
            rule = rule_for(node)
            after = rule and rule(node, {n: units[n] for n in node.all_input_nodes}, ties)
            if after is None:
                return None
            units[node] = after
        elif node.op == "output":
            return units[node.all_input_nodes[0]], ties.classes
    raise AssertionError


def assert_true(function: Callable[[Tensor], Tensor], x: Tensor, dim: int) -> tuple[Units, Tensor]:
    """What the table says holds: constants are constant, labels say who depends on whom."""
    followed = follow(function, x, dim)
    assert followed is not None
    units, classes = followed
    y = Op(function)(x)
    assert units.labels.shape == units.constant.shape == y.shape
    known = ~units.constant.isnan()
    torch.testing.assert_close(y[known].to(torch.float64), units.constant[known])
    for channel in range(len(CONSTANT), x.shape[dim]):
        other = x.clone()
        other.select(dim, channel).add_(torch.rand_like(other.select(dim, channel)) + 0.1)
        changed = Op(function)(other) != y
        own = classes[channel + 1]
        assert own == 0 or bool((classes[units.labels[changed]] == own).all())
    return units, classes


def torch_ops(names: str) -> list[tuple[str, Any]]:
    return [(name, getattr(torch, name)) for name in names.split()]


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
    "reciprocal root": lambda x: x.abs().add(1.0).rsqrt(),
    "alias": torch.ops.aten.alias.default,
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
    **dict(
        torch_ops(
            "asinh atan ceil cosh erfc exp2 expm1 floor frac nan_to_num round sgn sign sinc sinh "
            "tan trunc"
        )
    ),
    **{
        name: functools.partial(lambda f, x: f(x.abs() + 2.0), function)
        for name, function in torch_ops("acosh lgamma log log10 log1p log2 reciprocal")
    },
    **{
        name: functools.partial(lambda f, x: f(x.sigmoid() / 2), function)
        for name, function in torch_ops("acos asin atanh erfinv logit")
    },
    **{
        name: functools.partial(lambda f, x: f(x, 0.75), function)
        for name, function in torch_ops("eq ne lt le gt ge fmod remainder floor_divide")
    },
    "not": torch.logical_not,
    "one slope": lambda x: F.prelu(x, torch.full((1,), 0.2, dtype=x.dtype)),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=False),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=False),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str) -> None:
    units, classes = assert_true(ELEMENTWISE[name], example((2, 5, 6), 1), 1)
    assert classes.tolist() == list(range(6))
    assert units.labels[1, :, 2].tolist() == [1, 2, 3, 4, 5]
    at_zero = float(ELEMENTWISE[name](torch.zeros(1, 1, 1, dtype=torch.float64)))
    assert float(units.constant[0, 0, 0]) == pytest.approx(at_zero)  # f(0), not merely "unknown"
    assert units.constant[:, 3:].isnan().all()


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
    "upsampled": (2, lambda x: F.interpolate(x, scale_factor=2.0)),
    "upsampled smoothly": (2, lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")),
    **{
        f"upsampled {dims}d {mode}": (
            dims,
            functools.partial(F.interpolate, scale_factor=2.0, mode=mode),
        )
        for dims, modes in (
            (1, "nearest nearest-exact linear"),
            (2, "nearest-exact bicubic"),
            (3, "nearest nearest-exact trilinear"),
        )
        for mode in modes.split()
    },
    **{
        f"made smaller {mode}": (
            2,
            functools.partial(F.interpolate, size=(4, 4), mode=mode, antialias=True),
        )
        for mode in ("bilinear", "bicubic")
    },
    "flip": (2, lambda x: x.flip(2, -1)),
    "roll": (2, lambda x: x.roll((1, -2), (2, 3))),
    "roll of all but the channels": (1, lambda x: x.select(0, 0).roll(1, -1)),
    "running sum": (2, lambda x: x.cumsum(2)),
    "largest": (2, lambda x: x.amax((2, 3))),
    "smallest": (2, lambda x: x.amin(-1, keepdim=True)),
    "largest, with its place": (1, lambda x: x.max(2)[0]),
    "smallest, with its place": (1, lambda x: x.min(2, keepdim=True)[0]),
    "length": (2, lambda x: torch.linalg.vector_norm(x, dim=(2, 3))),
    "index_select": (2, lambda x: x.index_select(2, torch.tensor([3, 1, 1]))),
    "index": (2, lambda x: x[:, :, torch.tensor([[3, 1], [0, 1]])]),
    "index along two dimensions": (2, lambda x: x[..., torch.arange(3), torch.arange(3)]),
    "index of the batch": (1, lambda x: x[torch.zeros(3, dtype=torch.int64)]),
    "gather": (1, lambda x: x.gather(2, x.argmax(2, keepdim=True))),
    "index_add": (1, lambda x: torch.zeros_like(x).index_add(2, torch.arange(6) // 2, x)),
    "scatter_add": (
        1,
        lambda x: torch.zeros_like(x).scatter_add(
            2, (torch.arange(6) // 2).view(1, 1, 6).expand_as(x), x
        ),
    ),
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


@pytest.mark.parametrize(("name", "batch"), thinned_product(2, SPATIAL, [1, 2]))
def test_dimensions(name: str, batch: int) -> None:
    dims, function = SPATIAL[name]
    units, classes = assert_true(function, example((batch, 5, *[6] * dims), 1), 1)
    assert classes.tolist() == list(range(6))
    zero = units.constant[units.labels == 1]
    assert bool((zero == 0).all()) == (name != "padding with 3")


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # The op, and what it does to the labels of the channels.
    "cat": (lambda x: torch.cat([x, x.relu()], 1), lambda c: torch.cat([c, c])),
    "stack": (lambda x: torch.stack([x, -x], 1), lambda c: torch.stack([c, c])),
    "chunk": (lambda x: x.chunk(2, 1)[1], lambda c: c[4:]),
    "split": (lambda x: x.split([2, 6], 1)[1], lambda c: c[2:]),
    "split evenly": (lambda x: x.split(4, 1)[0], lambda c: c[:4]),
    "unbind": (lambda x: x.unbind(0)[0], lambda c: c),
    "slice": (lambda x: x[:, 1:7:2], lambda c: c[1:7:2]),
    "select": (lambda x: x[:, 4], lambda c: c[4]),
    "narrow": (lambda x: x.narrow(1, 4, 2), lambda c: c[4:6]),
    "movedim": (lambda x: x.movedim(0, 1).movedim(1, 0), lambda c: c),
    "channels split": (lambda x: x.view(2, 2, 4, 3), lambda c: c.view(2, 4)),
    "channels merged and split": (
        lambda x: x.flatten(1).view(2, 6, 4),
        lambda c: c.repeat_interleave(3).view(6, 4),
    ),
    "swapaxes": (lambda x: x.swapaxes(1, 2).swapdims(2, 1), lambda c: c),
    "mT": (lambda x: x.mT.transpose(1, 2), lambda c: c),
    "type_as": (lambda x: x.type_as(x.relu()), lambda c: c),
    "t": (lambda x: x[0].t().t(), lambda c: c),
    "rows of a table": (lambda x: F.embedding(torch.tensor([2, 0]), x[0].t()), lambda c: c),
    "flip": (lambda x: x.flip(1), lambda c: c.flip(0)),
    "tile": (lambda x: x.tile(1, 2, 1), lambda c: c.repeat(2)),
    "broadcast_to": (lambda x: x[:, :, :1].broadcast_to(2, 8, 5), lambda c: c),
    "expand_as": (lambda x: x[:, :, :1].expand_as(x), lambda c: c),
    "reshape_as": (lambda x: x.flatten(1).reshape_as(x), lambda c: c),
    "view_as": (lambda x: x.flatten(1).view_as(x), lambda c: c),
    "pixel_unshuffle": (
        lambda x: F.pixel_unshuffle(x[..., None].expand(2, 8, 3, 3), 3),
        lambda c: c,
    ),
    "places as channels": (
        lambda x: F.unfold(x[..., None].expand(2, 8, 3, 3), 2, padding=1),
        lambda c: c,
    ),
    "ones_like": (torch.ones_like, lambda c: c),
    "full_like": (lambda x: torch.full_like(x, 3.0), lambda c: c),
    "largest place": (lambda x: x.argmax(2).double(), lambda c: c),
    "smallest place": (lambda x: x.argmin(2).double(), lambda c: c),
    "places of the largest": (lambda x: x.max(2)[1].double(), lambda c: c),
    "repeat": (lambda x: x.repeat(1, 2, 1), lambda c: c.repeat(2)),
    "repeat_interleave": (
        lambda x: x.repeat_interleave(2, 1),
        lambda c: c.repeat_interleave(2),
    ),
    "expand": (
        lambda x: x[:, :, None].expand(2, 8, 3, 3).reshape(2, 24, 3),
        lambda c: c.repeat_interleave(3),
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_moves(name: str) -> None:
    function, labels = MOVES[name]
    units, classes = assert_true(function, example((2, 8, 3), 1), 1)
    assert classes.tolist() == list(range(9))
    assert units.labels.unique().tolist() == labels(torch.arange(1, 9)).unique().tolist()


def heads(x: Tensor) -> Tensor:
    """[batch, 4, places] -> [batch, places, 2 heads, 2]."""
    return x.transpose(1, 2).unflatten(2, (2, 2))


TIES: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    # The op on [2, 4, 6] with 4 channels, and the classes of its channels; 0 is what stays.
    "softmax": (lambda x: x.softmax(1), [1, 1, 1, 1]),
    "softmax of others": (lambda x: x.softmax(2), [1, 2, 3, 4]),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[1:]), [1, 1, 1, 1]),
    "layer norm of others": (lambda x: F.layer_norm(x, x.shape[2:]), [1, 2, 3, 4]),
    "group norm of one group": (lambda x: F.group_norm(x, 1), [1, 1, 1, 1]),
    "group norm of two groups": (lambda x: F.group_norm(x, 2), [1, 1, 3, 3]),
    "instance norm": (F.instance_norm, [1, 2, 3, 4]),
    "instance norm of others": (lambda x: F.instance_norm(x.transpose(1, 2)), [1, 1, 1, 1]),
    "rms norm": (lambda x: F.rms_norm(x, x.shape[1:]), [1, 1, 1, 1]),
    "log_softmax": (lambda x: x.log_softmax(1), [1, 1, 1, 1]),
    "running sum": (lambda x: x.cumsum(1), [1, 1, 1, 1]),
    "largest": (lambda x: x.amax(1), [1, 1, 1, 1]),
    "largest of all": (lambda x: x.max(), [1, 1, 1, 1]),
    "all and any": (lambda x: (x > 0).all(1).logical_or((x > 0).any(1)), [1, 1, 1, 1]),
    **{
        name: (functools.partial(lambda f, x: f(x, 1), function), [1] * 4)
        for name, function in torch_ops("logsumexp prod std var")
    },
    **{
        f"{name} of others": (
            functools.partial(lambda f, x: f(x, 2)[0], function),
            [1, 2, 3, 4],
        )
        for name, function in torch_ops("std_mean var_mean")
    },
    "variance of all": (lambda x: x.var(unbiased=False), [1, 1, 1, 1]),
    "normalize": (F.normalize, [1, 1, 1, 1]),
    "normalize others": (lambda x: F.normalize(x, dim=2), [1, 2, 3, 4]),
    "glu": (lambda x: F.glu(x, 1), [1, 2, 1, 2]),
    "glu of others": (F.glu, [1, 2, 3, 4]),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x[..., None], 2), [1, 1, 1, 1]),
    "fold": (lambda x: F.fold(x, (3, 4), 2), [1, 1, 1, 1]),
    "einsum": (lambda x: torch.einsum("bct,bcs->bts", x, x.relu()), [1, 1, 1, 1]),
    "einsum of each": (lambda x: torch.einsum("bct,bcs->bcts", x, x.relu()), [1, 2, 3, 4]),
    "einsum with a table": (
        lambda x: torch.einsum("bct,ts->bsc", x, torch.ones(6, 2, dtype=x.dtype)),
        [0, 0, 0, 0],
    ),
    "mm": (lambda x: torch.mm(x[0].t(), x[0]), [1, 1, 1, 1]),
    "expanded as another": (lambda x: x[:, :1].expand_as(x), [0, 2, 3, 4]),
    "shaped as another": (lambda x: x[:, 2:].reshape_as(x[:, :2]), [1, 2, 1, 2]),
    **{
        name: (
            functools.partial(lambda f, x: f(x[:, :2], x[:, 2:]).to(x.dtype), function),
            [1, 2, 1, 2],
        )
        for name, function in torch_ops(
            "atan2 hypot max min eq ne lt le gt ge fmod remainder logical_and logical_or "
            "floor_divide"
        )
    },
    "a power of the other": (lambda x: x[:, :2].exp() ** x[:, 2:], [1, 2, 1, 2]),
    "between": (lambda x: torch.lerp(x[:, :2], x[:, 2:], 0.3), [1, 2, 1, 2]),
    "plus a product": (lambda x: torch.addcmul(x[:, :2], x[:, 2:], x[:, 1:3]), [1, 1, 1, 1]),
    "plus a quotient": (
        lambda x: torch.addcdiv(x[:, :2], x[:, 2:], x[:, 2:].exp()),
        [1, 2, 1, 2],
    ),
    "mean over channels": (lambda x: x.mean(1), [1, 1, 1, 1]),
    "a quotient of numbers": (lambda x: x.mean() / x.exp().sum(), [1, 1, 1, 1]),
    "mean over everything": (lambda x: x.mean(), [1, 1, 1, 1]),
    "sum over channels": (lambda x: x.sum(1, keepdim=True), [1, 1, 1, 1]),
    "sum over others": (lambda x: x.sum(2), [1, 2, 3, 4]),
    "a product of itself": (lambda x: x * x.sigmoid(), [1, 2, 3, 4]),
    "a difference of halves": (lambda x: x[:, :2] - x[:, 2:], [1, 2, 1, 2]),
    "a quotient of halves": (lambda x: x[:, :2] / x[:, 2:].exp(), [1, 2, 1, 2]),
    "the larger": (lambda x: torch.maximum(x[:, :2], x[:, 2:]), [1, 2, 1, 2]),
    "the smaller": (lambda x: torch.minimum(x[:, :2], x[:, 2:]), [1, 2, 1, 2]),
    "one for all": (lambda x: x * x[:, 2:3], [1, 2, 0, 4]),
    "a number for all": (lambda x: x + x[0, 1, 2], [1, 0, 3, 4]),
    "a constant tensor": (lambda x: x * torch.ones(1, 4, 1), [0, 0, 0, 0]),
    "a constant broadcast": (lambda x: x * torch.ones(6), [1, 2, 3, 4]),
    "a norm in each head": (
        lambda x: heads(x) * heads(x).square().mean(-1, keepdim=True).add(1.0).rsqrt(),
        [1, 1, 3, 3],
    ),
    "a norm of each place in a head": (
        lambda x: heads(x) * heads(x).square().mean(-2, keepdim=True).add(1.0).rsqrt(),
        [1, 2, 1, 2],
    ),
    "the same numbers for each head": (lambda x: heads(x) * torch.ones(2), [1, 1, 3, 3]),
    "the first head for each": (lambda x: heads(x) + heads(x)[:, :, :1], [0, 0, 3, 3]),
    "filled": (lambda x: x.masked_fill(torch.ones(6, dtype=torch.bool), 0.5), [1, 2, 3, 4]),
    "where": (
        lambda x: torch.where(torch.ones(6, dtype=torch.bool), x[:, :2], x[:, 2:]),
        [1, 2, 1, 2],
    ),
    "a product": (lambda x: x @ x.transpose(1, 2), [1, 1, 1, 1]),
    "a product in each": (
        lambda x: (x[..., None] @ x[..., None].transpose(2, 3)).softmax(-1),
        [1, 2, 3, 4],
    ),
    "a product of batches": (lambda x: torch.bmm(x.transpose(1, 2), x), [1, 1, 1, 1]),
    "added to a product": (
        lambda x: torch.baddbmm(x @ x.transpose(1, 2), x, x.transpose(1, 2)),
        [1, 1, 1, 1],
    ),
    "attention in heads": (
        lambda x: F.scaled_dot_product_attention(
            x.view(2, 4, 3, 2), x.view(2, 4, 3, 2), x.view(2, 4, 3, 2)
        ),
        [1, 2, 3, 4],
    ),
    "attention of pairs of heads": (
        lambda x: F.scaled_dot_product_attention(
            x.view(2, 4, 3, 2),
            x[:, ::2].view(2, 2, 3, 2),
            x[:, ::2].view(2, 2, 3, 2),
            enable_gqa=True,
        ),
        [1, 1, 3, 3],
    ),
    "attention with a mask": (
        lambda x: F.scaled_dot_product_attention(
            x.view(2, 4, 3, 2),
            x.view(2, 4, 3, 2),
            x.view(2, 4, 3, 2),
            attn_mask=torch.ones(4, 3, 3).to(x.dtype),
        ),
        [0, 0, 0, 0],
    ),
}


@pytest.mark.parametrize("name", TIES)
def test_ties(name: str) -> None:
    function, expected = TIES[name]
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    followed = follow(function, x, 1)
    assert followed is not None
    units, classes = followed
    assert classes[1:].tolist() == expected
    y = Op(function)(x)
    assert units.labels.shape == y.shape
    for channel in range(4):
        other = x.clone()
        other[:, channel] += torch.rand(2, 6) + 0.1
        changed = Op(function)(other) != y
        own = classes[channel + 1]
        assert own == 0 or bool((classes[units.labels[changed]] == own).all())


def test_zeros_of_sums_and_products() -> None:
    x = example((2, 6, 3), 1)
    product, _ = assert_true(lambda x: x[:, :3] * x[:, 3:], x, 1)
    assert product.constant[0, :, 0].nan_to_num(nan=9).tolist() == [0, 9, 9]
    one, _ = assert_true(lambda x: x[:, :1].exp().sub(x[:, :1].cos(), alpha=2), x, 1)
    assert one.constant.unique().tolist() == [-1]


def test_places_of_a_pool_follow_its_channels() -> None:
    function = lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[1].double()  # noqa: E731
    units, classes = assert_true(function, example((2, 5, 6, 6), 1), 1)
    assert classes.tolist() == list(range(6))
    assert units.labels[0, :, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert units.constant.isnan().all()


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "pooling over channels": lambda x: F.max_pool1d(x.flatten(2).transpose(1, 2), 2),
    "padding channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)),
    "dropout in training": lambda x: F.dropout(x, 0.0, training=True),
    "another order": lambda x: x.roll(1, 1),
    "all in another order": lambda x: x.roll(1),
    "some of the channels": lambda x: x[:, torch.tensor([4, 1])],
    "some channels, selected": lambda x: x.index_select(1, torch.tensor([4, 1])),
    "places that are not neighbours": lambda x: x[torch.arange(2), :, torch.arange(2)],
    "added to channels": lambda x: torch.zeros_like(x).index_add(1, torch.arange(5), x),
    "a weight for each": lambda x: F.instance_norm(x, weight=torch.ones(5, dtype=x.dtype)),
    "a slope for each": lambda x: F.prelu(x, torch.ones(5, dtype=x.dtype)),
    "einsum with a diagonal": lambda x: torch.einsum("bcii->bci", x),
    "a number to the power of x": lambda x: 2**x,
    "the bytes of it": lambda x: x.view(torch.int64).double(),
    "a product of a vector": lambda x: x.select(0, 0).flatten() @ x.select(0, 1).flatten(),
    "repeats by a tensor": lambda x: x.repeat_interleave(torch.ones(5).long(), 1),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_cannot_be_followed_stops(name: str) -> None:
    followed = follow(STOPS[name], example((2, 5, 6, 6), 1), 1)
    assert followed is None or bool((followed[0].labels == 0).all())


def test_every_rule_is_tried() -> None:
    """The tables above use each op of the table, or its twin in place."""
    used: set[str] = set()
    cases: list[tuple[Any, tuple[int, ...]]] = [(f, (2, 5, 6)) for f in ELEMENTWISE.values()]
    cases += [(function, (2, 5, *[6] * dims)) for dims, function in SPATIAL.values()]
    cases += [(function, (2, 8, 3)) for function, _ in MOVES.values()]
    cases += [(function, (2, 4, 6)) for function, _ in TIES.values()]
    for function, shape in cases:
        used |= {op_name(node).removesuffix("_") for node in graph_of(function, *shape).nodes}
    named = {name.removesuffix("_") for name in {*RULES, *JOINS}}
    assert named - used == {"aten::_unsafe_view"}  # torch.compile's own
