"""What an op does to units: one function for each kind of op.

Ops that only move elements are run on the labels themselves; an op that mixes units ties them: they
can only vanish together. Each takes a node, the `Units` of each node among its arguments and the
`Ties`, and gives Units, a list of them, or None where the units cannot be followed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from l0fast.graph.nodes import argument, op_name, run_on, shape_of
from l0fast.graph.units import Rule, Ties, Units, narrowed, reshaped, unknown, varying


def _zeros_only(constant: Tensor) -> Tensor:
    """Zeros stay, any other constant is no longer known."""
    constant = narrowed(constant)
    return constant.masked_fill(constant != 0, math.nan)


# --- ops with one tensor input ----------------------------------------------------------------


def elementwise(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """y = f(x) with the same f everywhere: a constant c becomes f(c)."""
    (source,) = units
    labels, constant = units[source].labels, narrowed(units[source].constant)
    constant = run_on(node, {source: constant.clone()}).to(torch.float64)
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
    return None if argument(node, 2, "train", True) else source


_RESHAPES = ("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten")


def _moved(node: Node, of: Mapping[Node, Tensor]) -> Any:
    """What a node that moves elements makes of other tensors, without a copy of what repeats."""
    shape, tensors = shape_of(node), list(of.values())
    if shape is not None and op_name(node) in _RESHAPES:
        return reshaped(tensors[0], shape)
    if shape is None or op_name(node) != "aten::cat" or {t.dim() for t in tensors} != {len(shape)}:
        return run_on(node, of)
    dim = argument(node, 1, "dim", 0) % len(shape)
    narrow = [narrowed(tensor) for tensor in tensors]
    sizes = [max(part.shape[other] for part in narrow) for other in range(len(shape))]
    parts = (
        part.expand(*sizes[:dim], tensor.shape[dim], *sizes[dim + 1 :])
        for part, tensor in zip(narrow, tensors, strict=True)
    )
    return run_on(node, dict(zip(of, parts, strict=True))).expand(shape)


def move(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | list[Units] | None:
    """Moves elements, takes some or repeats them: done to the labels as to the values."""
    labels = _moved(node, {source: value.labels for source, value in units.items()})
    constants = _moved(node, {source: value.constant for source, value in units.items()})
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
    widths = argument(node, 1, "pad")
    result = spatial(len(widths) // 2)(node, units, ties)
    zeros = argument(node, 3, "value") in (None, 0)
    if (
        not isinstance(result, Units)
        or zeros
        or argument(node, 2, "mode", "constant") != "constant"
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
    dims = _dims(argument(node, 1, "dim"), source.labels.dim())
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
        dims = _dims(argument(node, position, "dim"), source.labels.dim())
        _mixed(source.labels, dims, op_name(node), ties)
        return Units(source.labels, unknown(source.labels.shape).constant)

    return rule


def norm(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """layer_norm, rms_norm: units along the normalised dimensions vanish together."""
    source = units[node.args[0]]  # type: ignore[index]
    rank, shape = source.labels.dim(), argument(node, 1, "normalized_shape")
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


def _repeated(labels: Tensor, times: int) -> Tensor:
    """labels.repeat_interleave(times, -3), without a copy of what repeats."""
    *outer, heads, rows, columns = labels.shape
    several = labels.unsqueeze(-3).expand(*outer, heads, times, rows, columns)
    return reshaped(several, (*outer, heads * times, rows, columns))


def attention(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """softmax(q @ k^T + mask) @ v, with heads as a dimension before the last two."""
    query, key, value = (units[source].labels for source in node.args[:3])  # type: ignore[index]
    name, shape, mask = op_name(node), shape_of(node), argument(node, 3, "attn_mask")
    if shape is None or query.dim() < 3:
        return None
    if query.shape[-3] != key.shape[-3]:  # enable_gqa
        times = query.shape[-3] // key.shape[-3]
        key, value = (_repeated(part, times) for part in (key, value))
    scores = (*shape[:-1], key.shape[-2])
    weights = _product(query, key.transpose(-1, -2), scores, name, ties)
    if mask is not None:
        weights = _joined([weights, units[mask].labels], scores, name, ties)
    return Units(_product(weights, value, shape, name, ties), unknown(shape).constant)
