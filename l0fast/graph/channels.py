"""What each op does to the units of a tensor: the table that `liveness` follows.

A `Units` says of each element of a tensor which unit (a channel that some layer makes) it belongs
to, and whether it is constant. Ops that only move elements are run on the labels themselves; an op
that mixes units ties them: they can only vanish together. An op that is not in the table reads
every value it is given, and nothing is known of what it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

STAYS = 0
"""The label of what has no unit: it stays where it is."""


@dataclass(frozen=True)
class Units:
    """Who is where in a tensor."""

    labels: Tensor
    """int64, of the tensor's shape: the unit that each element belongs to."""
    constant: Tensor
    """float64, of the tensor's shape: the value that an element always has, or NaN."""


class Ties(Protocol):
    """Where the rules write down which units cannot vanish alone."""

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        """Elements of the two label tensors, which broadcast, vanish together or not at all."""

    def pin(self, labels: Tensor, reason: str) -> None:
        """These units must exist, with their values."""


Rule = Callable[[Node, Any, Ties], Any]
"""(node, Units of each node among its arguments, ties) -> Units, a list of them, or None where
the units cannot be followed."""


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of the (first) tensor a node gives, if it is known and static."""
    value: Any = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    shape = getattr(value, "shape", None)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return tuple(shape)


def unknown(shape: Sequence[int]) -> Units:
    """A tensor of which nothing is known."""
    return Units(
        torch.tensor(STAYS).expand(shape), torch.tensor(math.nan, dtype=torch.float64).expand(shape)
    )


def _equal(first: Tensor, second: Tensor) -> Tensor:
    return (first == second) | ((first != first) & (second != second))


def narrowed(values: Tensor) -> Tensor:
    """The tensor with size 1 wherever it does not vary along a dimension."""
    for dim, size in enumerate(values.shape):
        if size <= 1:
            continue
        first = values.narrow(dim, 0, 1)
        if values.stride(dim) == 0 or bool(_equal(values, first).all()):
            values = first
    return values


def varying(values: Tensor) -> list[int]:
    """The dimensions along which a tensor varies."""
    return [dim for dim, size in enumerate(narrowed(values).shape) if size > 1]


def op_name(node: Node) -> str:
    """The name of a node's op, as in the table; "" for what is not an op."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name
    return getattr(node.target, "__name__", str(node.target))


def writes_in_place(node: Node) -> bool:
    """Whether a node may change one of its inputs."""
    if node.op != "call_function" or op_name(node) == "getitem":
        return False
    schema = getattr(node.target, "_schema", None)
    return True if schema is None else schema.is_mutable


def _argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _run(node: Node, of: Mapping[Node, Tensor]) -> Any:
    """The node's own op, on other tensors."""
    target: Any = node.target
    if op_name(node) in ("aten::view", "aten::_unsafe_view"):
        target = torch.ops.aten.reshape.default  # what stands for the tensor may be expanded
    with torch.no_grad():
        return target(*map_arg(node.args, of.__getitem__), **map_arg(node.kwargs, of.__getitem__))


def _zeros_only(constant: Tensor) -> Tensor:
    """Zeros stay, any other constant is no longer known."""
    constant = narrowed(constant)
    return constant.masked_fill(constant != 0, math.nan)


# --- ops with one tensor input ----------------------------------------------------------------


def elementwise(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """y = f(x) with the same f everywhere: a constant c becomes f(c)."""
    (source,) = units
    labels, constant = units[source].labels, narrowed(units[source].constant)
    constant = _run(node, {source: constant.clone()}).to(torch.float64)
    return Units(labels, constant.expand(labels.shape))


def same(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """y has x's values, at most in another dtype, device or layout."""
    (source,) = units.values()
    return replace(source, constant=_zeros_only(source.constant).expand(source.labels.shape))


def like(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """y has x's values, in the dtype of another tensor, whose values nobody reads."""
    source: Any = node.args[0]
    return same(node, {source: units[source]}, ties)


def dropout(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """Nothing in evaluation; a functional dropout left in training mode cannot be followed."""
    (source,) = units.values()
    return None if _argument(node, 2, "train", True) else source


def move(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | list[Units] | None:
    """Moves elements, takes some or repeats them: done to the labels as to the values."""
    labels = _run(node, {source: value.labels for source, value in units.items()})
    constants = _run(node, {source: value.constant for source, value in units.items()})
    if isinstance(labels, Tensor):
        return Units(labels, constants)
    return [Units(*pair) for pair in zip(labels, constants, strict=True)]


def view(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | list[Units] | None:
    """A view of the same dtype moves elements; one of their bytes cannot be followed."""
    return None if isinstance(node.args[1], torch.dtype) else move(node, units, ties)


def spatial(dims: int, means: bool = False) -> Rule:
    """Pools, pads or scales the last `dims` dimensions: 0 stays 0 (padding adds zeros).

    Args:
        dims: how many.
        means: nothing is added, so that every constant stays.
    """

    def rule(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | list[Units] | None:
        (source,) = units.values()
        shape, rank = shape_of(node), source.labels.dim()
        if shape is None or any(dim >= rank - dims for dim in varying(source.labels)):
            return None
        labels, constant = narrowed(source.labels), narrowed(source.constant)
        if not means:
            constant = _zeros_only(constant)
        if any(dim >= rank - dims for dim in varying(constant)):
            constant = unknown(()).constant
        result = Units(labels.expand(shape), constant.expand(shape))
        several = isinstance(node.meta["val"], (tuple, list))
        return [result, unknown(shape)] if several else result  # a pool may give indices too

    return rule


def pad(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | list[Units] | None:
    """Pads dimensions along which the units do not vary, with zeros or with what is there."""
    widths = _argument(node, 1, "pad")
    result = spatial(len(widths) // 2)(node, units, ties)
    zeros = _argument(node, 3, "value") in (None, 0)
    if (
        not isinstance(result, Units)
        or zeros
        or _argument(node, 2, "mode", "constant") != "constant"
    ):
        return result
    return replace(result, constant=unknown(result.labels.shape).constant)


def _mixed(labels: Tensor, dims: Sequence[int], reason: str, ties: Ties) -> Tensor:
    """Ties all units along some dimensions; the labels, with size 1 there."""
    first = labels
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    ties.tie(labels, first, reason)
    return first


def _dims(given: Any, rank: int) -> list[int]:
    """A dim argument as a list of dims >= 0; all of them where none is given."""
    if given is None or given == []:
        return list(range(rank))
    return [dim % rank for dim in ([given] if isinstance(given, int) else given)]


def reduction(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """Means and sums: units along the dimensions that go vanish together."""
    (source,) = units.values()
    shape = shape_of(node)
    if shape is None or not source.labels.dim():
        return None
    dims = _dims(_argument(node, 1, "dim"), source.labels.dim())
    labels = _mixed(source.labels, dims, op_name(node), ties)
    constant = narrowed(source.constant)
    if op_name(node) != "aten::mean" or set(dims) & set(varying(constant)):
        constant = _zeros_only(constant)
        for dim in dims:
            constant = constant.sum(dim, keepdim=True)
    constant = constant.expand(labels.shape)
    return Units(labels.reshape(shape), constant.reshape(shape))


def along(position: int) -> Rule:
    """Softmax and its like, along one dimension: units along it vanish together."""

    def rule(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
        (source,) = units.values()
        dims = _dims(_argument(node, position, "dim"), source.labels.dim())
        _mixed(source.labels, dims, op_name(node), ties)
        return Units(source.labels, unknown(source.labels.shape).constant)

    return rule


def norm(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """layer_norm, rms_norm: units along the normalised dimensions vanish together."""
    source = units[node.args[0]]  # type: ignore[index]
    rank, shape = source.labels.dim(), _argument(node, 1, "normalized_shape")
    _mixed(source.labels, range(rank - len(shape), rank), op_name(node), ties)
    return Units(source.labels, unknown(source.labels.shape).constant)


# --- ops with several -------------------------------------------------------------------------


def _joined(parts: Sequence[Tensor], shape: Sequence[int], reason: str, ties: Ties) -> Tensor:
    """Labels of an elementwise function of several tensors, of `shape`.

    What lies at the same place vanishes together. A tensor that is broadcast over units is read by
    each of them, and must stay.
    """
    whole: Tensor | None = None
    dims = {
        id(part): {dim + len(shape) - part.dim() for dim in varying(part)}  # of the result
        for part in parts
    }
    for part in parts:
        padded = [1] * (len(shape) - part.dim()) + list(part.shape)
        over = {dim for dim, size in enumerate(padded) if size == 1 and shape[dim] > 1}
        if any(over & dims[id(other)] for other in parts):
            ties.pin(part, reason)
        elif whole is None:
            whole = part.expand(shape)
        else:
            ties.tie(whole, part.expand(shape), reason)
    return unknown(shape).labels if whole is None else whole


def join(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """An elementwise function of several tensors."""
    shape = shape_of(node)
    if shape is None:
        return None
    labels = _joined([u.labels for u in units.values()], shape, op_name(node), ties)
    constant = unknown(shape).constant
    kind = op_name(node).removeprefix("aten::").removesuffix("_")
    if kind in ("add", "sub", "mul"):
        narrow = {source: narrowed(value.constant).clone() for source, value in units.items()}
        if kind == "mul":
            zero = torch.stack(torch.broadcast_tensors(*(value == 0 for value in narrow.values())))
            constant = _zeros_only((~zero.any(0)).double())
        else:
            first, second = map_arg(node.args[:2], narrow.__getitem__)
            function = torch.add if kind == "add" else torch.sub
            constant = function(first, second, alpha=node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    return Units(labels, constant.expand(shape))


def _product(first: Tensor, second: Tensor, shape: Sequence[int], reason: str, ties: Ties) -> Any:
    """Labels of a matrix product; what it sums over vanishes together."""
    rows = _mixed(first, [first.dim() - 1], reason, ties).expand(*first.shape[:-1], shape[-1])
    columns = _mixed(second, [second.dim() - 2], reason, ties)
    columns = columns.expand(*second.shape[:-2], shape[-2], second.shape[-1])
    return _joined([rows, columns], shape, reason, ties)


def matmul(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """y = a @ b, of at least two dimensions each."""
    first, second = (units[source].labels for source in node.args[:2])  # type: ignore[index]
    shape = shape_of(node)
    if shape is None or first.dim() < 2 or second.dim() < 2:
        return None
    return Units(_product(first, second, shape, op_name(node), ties), unknown(shape).constant)


def attention(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """softmax(q @ k^T + mask) @ v, with heads as a dimension before the last two."""
    query, key, value = (units[source].labels for source in node.args[:3])  # type: ignore[index]
    name, shape, mask = op_name(node), shape_of(node), _argument(node, 3, "attn_mask")
    if shape is None or query.dim() < 3:
        return None
    if query.shape[-3] != key.shape[-3]:  # enable_gqa
        times = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(times, -3) for part in (key, value))
    scores = (*shape[:-1], key.shape[-2])
    weights = _product(query, key.transpose(-1, -2), scores, name, ties)
    if mask is not None:
        weights = _joined([weights, units[mask].labels], scores, name, ties)
    return Units(_product(weights, value, shape, name, ties), unknown(shape).constant)


# --- the table --------------------------------------------------------------------------------


def _aten(names: str, *, in_place: bool = False) -> list[str]:
    found = [f"aten::{name}" for name in names.split()]
    return found + [f"{name}_" for name in found] if in_place else found


ELEMENTWISE = _aten(
    "abs add celu clamp clamp_max clamp_min cos div elu erf exp gelu hardshrink hardsigmoid "
    "hardswish hardtanh leaky_relu log_sigmoid mish mul neg pow relu relu6 rsqrt rsub selu sigmoid "
    "silu sin softplus softshrink sqrt square sub tanh threshold",
    in_place=True,
)
"""Ops on each element; those with a number as a second argument may have a tensor instead."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_aten("alias clone contiguous detach to"), same),
    "aten::type_as": like,
    **dict.fromkeys(_aten("dropout feature_dropout", in_place=True), dropout),
    **dict.fromkeys(
        _aten(
            "cat chunk expand flatten movedim narrow permute repeat repeat_interleave reshape "
            "select slice split split_with_sizes squeeze stack swapaxes swapdims transpose unbind "
            "unflatten unsqueeze mT"
        ),
        move,
    ),
    **dict.fromkeys(_aten("view _unsafe_view"), view),
    **{
        f"aten::{kind}{dims}d": spatial(dims, means=kind != "avg_pool")
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for dims in (1, 2, 3)
    },
    "aten::upsample_nearest2d": spatial(2, means=True),
    "aten::upsample_bilinear2d": spatial(2, means=True),
    "aten::pad": pad,
    **dict.fromkeys(_aten("mean sum"), reduction),
    "aten::softmax": along(1),
    **dict.fromkeys(_aten("layer_norm rms_norm"), norm),
    **dict.fromkeys(_aten("matmul bmm"), matmul),
    "aten::scaled_dot_product_attention": attention,
}
"""Op -> rule."""

JOINS = _aten("add div masked_fill maximum minimum mul sub where", in_place=True)
"""Ops on each element of several tensors."""

_SEVERAL = _aten("bmm cat layer_norm matmul rms_norm scaled_dot_product_attention stack type_as")
"""Ops with a rule that may have several tensors."""

RIGID = set(
    _aten(
        "chunk expand narrow repeat reshape select slice split split_with_sizes unflatten view "
        "_unsafe_view unbind"
    )
)
"""Ops that a model may call with sizes written out, as in `x.view(-1, 800)`."""

IGNORED = {"aten::_assert_tensor_metadata"}
"""Ops that read no values."""


def rule_for(node: Node) -> Rule | None:
    """The rule of a node's op."""
    name = op_name(node)
    if len(node.all_input_nodes) > 1 and name in JOINS:
        return join
    if len(node.all_input_nodes) > 1 and name not in _SEVERAL:
        return None
    first = node.args[0] if node.args else None
    return RULES.get(name) if isinstance(first, (Node, list, tuple)) else None
