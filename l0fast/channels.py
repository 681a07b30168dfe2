"""What each op does to the channels of a tensor: the table that `graph` follows.

A `Flow` says which channel lies at each position along one dimension of a tensor, and which of
them are constant. A rule takes the flow of an op's input to that of its output; where it returns
None, or where there is no rule, the channels cannot be followed past the op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


@dataclass(frozen=True)
class Flow:
    """Channels along one dimension of a tensor."""

    dim: int
    """The dimension, >= 0."""
    labels: Tensor
    """int64 [size of the dimension]: which channel lies at each position; one may lie at many."""
    constant: Tensor
    """float64 [same]: the one value the position has everywhere, or NaN if it varies."""


Rule = Callable[[Node, Flow], Flow | None]


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of the (first) tensor a node gives, if it is known and static."""
    value: Any = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    shape = getattr(value, "shape", None)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return tuple(shape)


def _source(node: Node) -> tuple[int, ...] | None:
    """The shape of a node's one tensor input."""
    return shape_of(node.all_input_nodes[0])


def _zeros_only(constant: Tensor) -> Tensor:
    """Zeros stay, any other constant is no longer known."""
    return torch.where(constant == 0, 0.0, math.nan)


def elementwise(node: Node, flow: Flow) -> Flow | None:
    """y = f(x) with the same f everywhere: channel c becomes f(c)."""
    function: Any = node.target
    with torch.no_grad():
        constant = function(flow.constant.clone(), *node.args[1:], **node.kwargs)
    return replace(flow, constant=constant.to(torch.float64))


def same(node: Node, flow: Flow) -> Flow | None:
    """y has x's values, at most in another dtype, device or layout."""
    return replace(flow, constant=_zeros_only(flow.constant))


def dropout(node: Node, flow: Flow) -> Flow | None:
    """Nothing in evaluation; a functional dropout left in training mode cannot be followed."""
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True)
    return None if training else flow


def pooling(spatial: int) -> Rule:
    """Pools the last `spatial` dimensions: 0 stays 0 (padding adds zeros, or nothing)."""

    def rule(node: Node, flow: Flow) -> Flow | None:
        shape = _source(node)
        if shape is None or flow.dim >= len(shape) - spatial:
            return None
        return replace(flow, constant=_zeros_only(flow.constant))

    return rule


def mean(node: Node, flow: Flow) -> Flow | None:
    """Means over other dimensions than the channels'."""
    shape = _source(node)
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if shape is None or not isinstance(dims, Sequence) or not dims:
        return None
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    gone = {int(dim) % len(shape) for dim in dims}  # type: ignore[arg-type]
    if flow.dim in gone:
        return None
    before = 0 if keep else sum(dim < flow.dim for dim in gone)
    return replace(flow, dim=flow.dim - before)


def pad(node: Node, flow: Flow) -> Flow | None:
    """Pads other dimensions than the channels', with zeros or with what is there."""
    shape, widths = _source(node), node.args[1]
    if shape is None or not isinstance(widths, Sequence):
        return None
    if len(widths) // 2 > len(shape) - 1 - flow.dim:
        return None
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    if mode == "constant" and value not in (None, 0):
        return replace(flow, constant=torch.full_like(flow.constant, math.nan))
    return replace(flow, constant=_zeros_only(flow.constant))


def permute(node: Node, flow: Flow) -> Flow | None:
    """Dimensions in another order."""
    shape = _source(node)
    if shape is None:
        return None
    order = list(range(len(shape)))
    if isinstance(node.args[1], Sequence):
        order = [int(dim) % len(shape) for dim in node.args[1]]  # type: ignore[arg-type]
    else:
        first, second = (int(dim) % len(shape) for dim in node.args[1:3])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
    return replace(flow, dim=order.index(flow.dim))


def reshape(node: Node, flow: Flow) -> Flow | None:
    """Keeps the channels' dimension, or merges it with neighbours; one that splits it stops.

    Merged with `outer` x [channels] x `inner` elements, channel c lies at (o, c, i) for every
    o and i, in row-major order.
    """
    old, new = _source(node), shape_of(node)
    if old is None or new is None or math.prod(old) == 0:
        return None
    size = old[flow.dim]
    before, after = math.prod(old[: flow.dim]), math.prod(old[flow.dim + 1 :])
    found: list[tuple[int, int, int]] = []
    for dim in range(len(new)):
        outer, outer_rest = divmod(before, math.prod(new[:dim]))
        inner, inner_rest = divmod(after, math.prod(new[dim + 1 :]))
        if not outer_rest and not inner_rest and new[dim] == outer * size * inner:
            found.append((outer, inner, dim))
    if not found:
        return None
    # Only a single channel fits in several places: then in the one that merges least.
    outer, inner, dim = min(found)
    labels = flow.labels.repeat_interleave(inner).repeat(outer)
    return Flow(dim, labels, flow.constant.repeat_interleave(inner).repeat(outer))


def first_of_two(node: Node, flow: Flow) -> Flow | None:
    """values, indices = pool(x): the values."""
    return flow if node.args[1] == 0 else None


_ELEMENTWISE = (
    "abs add celu clamp clamp_max clamp_min cos div elu erf exp gelu hardshrink hardsigmoid "
    "hardswish hardtanh leaky_relu log_sigmoid mish mul neg pow relu relu6 rsub selu sigmoid "
    "silu sin softplus softshrink sqrt square sub tanh threshold"
)
_SAME = "clone contiguous detach to"

RULES: dict[str, Rule] = {
    **dict.fromkeys((f"aten::{name}" for name in _ELEMENTWISE.split()), elementwise),
    **dict.fromkeys((f"aten::{name}_" for name in _ELEMENTWISE.split()), elementwise),
    **dict.fromkeys((f"aten::{name}" for name in _SAME.split()), same),
    **dict.fromkeys(
        ("aten::dropout", "aten::dropout_", "aten::feature_dropout", "aten::feature_dropout_"),
        dropout,
    ),
    **{
        f"aten::{kind}_pool{spatial}d": pooling(spatial)
        for kind in ("max", "avg", "adaptive_avg", "adaptive_max")
        for spatial in (1, 2, 3)
    },
    "aten::mean": mean,
    "aten::pad": pad,
    "aten::permute": permute,
    "aten::transpose": permute,
    "getitem": first_of_two,
}
"""Op -> rule, for ops with one tensor input."""

_VIEWS = "flatten reshape squeeze unsqueeze view unflatten"
VIEW_RULES: dict[str, Rule] = dict.fromkeys((f"aten::{name}" for name in _VIEWS.split()), reshape)
"""The same, for ops that a model may call with sizes written out, as in `x.view(-1, 800)`."""

IGNORED = {"aten::_assert_tensor_metadata"}
"""Ops that read no values."""


def op_name(node: Node) -> str:
    """The name of a node's op, as in the table; "" for what is not an op."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name
    return getattr(node.target, "__name__", str(node.target))


def rule_for(node: Node, rules: Mapping[str, Rule]) -> Rule | None:
    """The rule of a node's op, if the op has one tensor input and that comes first."""
    sources = node.all_input_nodes
    if len(sources) != 1 or not node.args or node.args[0] is not sources[0]:
        return None
    return rules.get(op_name(node))


def writes_in_place(node: Node) -> bool:
    """Whether a node may change one of its inputs."""
    if node.op != "call_function" or op_name(node) == "getitem":
        return False
    schema = getattr(node.target, "_schema", None)
    return True if schema is None else schema.is_mutable
