"""What an op that mixes units does to them: one function for each kind of op.

Units that are mixed can only vanish together. The rules are as those of `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from l0fast.graph.nodes import argument, op_name, shape_of
from l0fast.graph.rules import dims_of, elementwise, zeros_only
from l0fast.graph.units import Rule, Ties, Units, narrowed, reshaped, unknown, varying

# --- along dimensions of one tensor -------------------------------------------------------------


def mixed(labels: Tensor, dims: Sequence[int], reason: str, ties: Ties) -> Tensor:
    """Ties all units along some dimensions; the labels, with size 1 there."""
    first = labels
    for dim in dims:
        first = first.narrow(dim, 0, 1)
    ties.tie(labels, first, reason)
    return first


_AVERAGES = {f"aten::{name}" for name in ("mean", "amax", "amin", "max", "min")}
"""Reductions of a constant that give the constant."""
_SUMS = {"aten::sum", "aten::linalg_vector_norm"}
"""Reductions of zeros that give zero."""


def reduction(position: int) -> Rule:
    """Means, sums and their like: units along the dimensions that go vanish together.

    Args:
        position: of the dim argument.
    """

    def rule(node: Node, units: Mapping[Node, Units], ties: Ties) -> Any:
        (source,) = units.values()
        shape, name = shape_of(node), op_name(node)
        if shape is None or not source.labels.dim():
            return None
        given = argument(node, position, "dim")
        if isinstance(given, Node):  # the larger of x and x
            return elementwise(node, units, ties)
        dims = dims_of(given, source.labels.dim())
        labels = mixed(source.labels, dims, name, ties).reshape(shape)
        constant = narrowed(source.constant)
        if name not in _AVERAGES or set(dims) & set(varying(constant)):
            constant = zeros_only(constant)
            for dim in dims:
                constant = constant.sum(dim, keepdim=True)
            if name not in _AVERAGES | _SUMS:
                constant = unknown(constant.shape).constant
        narrow = [1 if dim in dims else size for dim, size in enumerate(source.labels.shape)]
        result = Units(labels, constant.expand(narrow).reshape(shape))
        if isinstance(node.meta["val"], (tuple, list)):  # with their places, or of two kinds
            return [result, Units(labels, unknown(shape).constant)]
        return result

    return rule


def along(position: int, zeros: bool = False) -> Rule:
    """Softmax and its like, along one dimension: units along it vanish together.

    Args:
        position: of the dim argument.
        zeros: zeros all along it stay, as in a sum.
    """

    def rule(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
        (source,) = units.values()
        if not source.labels.dim():
            return None
        dims = dims_of(argument(node, position, "dim"), source.labels.dim())
        mixed(source.labels, dims, op_name(node), ties)
        constant = zeros_only(source.constant)
        if not zeros or set(dims) & set(varying(constant)):
            constant = unknown(()).constant
        return replace(source, constant=constant.expand(source.labels.shape))

    return rule


def glu(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """a * sigmoid(b), with a and b the halves of x: units at the same place vanish together."""
    (source,) = units.values()
    dim = argument(node, 1, "dim", -1)
    labels, gates = source.labels.chunk(2, dim)
    ties.tie(labels, gates, op_name(node))
    return Units(labels, zeros_only(source.constant.chunk(2, dim)[0]).expand(labels.shape))


def norm(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """layer_norm, rms_norm: units along the normalised dimensions vanish together."""
    source = units[node.args[0]]  # type: ignore[index]
    rank, shape = source.labels.dim(), argument(node, 1, "normalized_shape")
    mixed(source.labels, range(rank - len(shape), rank), op_name(node), ties)
    return Units(source.labels, unknown(source.labels.shape).constant)


def group_norm(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """Groups of channels that a function, not a layer, normalises: their number is written out, so
    that only one group of all of them can be followed."""
    source = units[node.args[0]]  # type: ignore[index]
    if node.args[1] != 1:
        return None
    mixed(source.labels, range(1, source.labels.dim()), op_name(node), ties)
    return Units(source.labels, unknown(source.labels.shape).constant)


def instance_norm(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """Each channel by itself, where there is no number for each: zeros stay."""
    if len(units) > 1:
        return None
    (source,) = units.values()
    mixed(source.labels, range(2, source.labels.dim()), op_name(node), ties)
    constant = zeros_only(source.constant)
    if any(dim > 1 for dim in varying(constant)):
        constant = unknown(()).constant
    return replace(source, constant=constant.expand(source.labels.shape))


# --- of several tensors --------------------------------------------------------------------------


def _read_by_all(part: Tensor, whole: Tensor | None, reason: str, ties: Ties) -> None:
    """A tensor that is broadcast over the units of others, which are those of `whole`.

    All of them read it, so that it must stay, and with it the whole size along its own dimensions.
    Not so where it is already sure to vanish with all who read it: a mean of a head's units.
    """
    if whole is None:
        ties.pin(part, reason)
        return
    mine, theirs = torch.broadcast_tensors(narrowed(part), narrowed(whole))
    apart = ~ties.together(mine, theirs)
    if bool(apart.any()):
        ties.pin(mine[apart], reason)
        mixed(whole, [dim for dim in varying(whole) if part.shape[dim] > 1], reason, ties)


def joined(parts: Sequence[Tensor], shape: Sequence[int], reason: str, ties: Ties) -> Tensor:
    """Labels of an elementwise function of several tensors, of `shape`.

    What lies at the same place vanishes together. A tensor that is broadcast over units must stay,
    see `_read_by_all`.
    """
    whole: Tensor | None = None
    dims = {
        id(part): {dim + len(shape) - part.dim() for dim in varying(part)}  # of the result
        for part in parts
    }
    broadcast: list[Tensor] = []
    for part in parts:
        part = part.view((1,) * (len(shape) - part.dim()) + part.shape)
        over = {dim for dim, size in enumerate(part.shape) if size < shape[dim]}
        if any(over & dims[id(other)] for other in parts):
            broadcast.append(part)
        elif whole is None:
            whole = part.expand(shape)
        else:
            ties.tie(whole, part.expand(shape), reason)
    for part in broadcast:
        _read_by_all(part, whole, reason, ties)
    return unknown(shape).labels if whole is None else whole


def join(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """An elementwise function of several tensors."""
    shape = shape_of(node)
    if shape is None:
        return None
    labels = joined([u.labels for u in units.values()], shape, op_name(node), ties)
    constant = unknown(shape).constant
    kind = op_name(node).removeprefix("aten::").removesuffix("_")
    if kind in ("add", "sub", "mul"):
        narrow = {source: narrowed(value.constant).clone() for source, value in units.items()}
        if kind == "mul":
            zero = torch.stack(torch.broadcast_tensors(*(value == 0 for value in narrow.values())))
            constant = zeros_only((~zero.any(0)).double())
        else:
            first, second = map_arg(node.args[:2], narrow.__getitem__)
            function = torch.add if kind == "add" else torch.sub
            constant = function(first, second, alpha=node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    return Units(labels, constant.expand(shape))


def shaped_like(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """expand_as, reshape_as, view_as: x's values, in the shape of another tensor."""
    source, other = (units[part] for part in node.args[:2])  # type: ignore[index]
    labels, constant, shape = source.labels, source.constant, tuple(other.labels.shape)
    if op_name(node) != "aten::expand_as":
        labels, constant = reshaped(labels, shape), reshaped(constant, shape)
    labels = joined([labels, other.labels], shape, op_name(node), ties)
    return Units(labels, constant.expand(shape))


def at_places(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """gather, index_add, scatter_add: reads or adds at places along a dimension without units."""
    source, index, *added = (units[part] for part in node.args if isinstance(part, Node))
    vector = op_name(node).startswith("aten::index_add")
    tensors = [source, *added] if vector else [source, index, *added]
    rank, shape = source.labels.dim(), shape_of(node)
    if shape is None or not rank or (vector and index.followed):
        return None
    dim: int = argument(node, 1, "dim") % rank
    over = (*shape[:dim], 1, *shape[dim + 1 :])
    others = [tuple(part.labels.shape[i] for i in range(rank) if i != dim) for part in tensors]
    if len(set(others)) > 1 or any(dim in varying(part.labels) for part in tensors):
        return None
    labels = [narrowed(part.labels).expand(over) for part in tensors]
    merged = joined(labels, over, op_name(node), ties)
    constants = [narrowed(part.constant) for part in (source, *added)]
    if any(constant.shape[dim] > 1 for constant in constants):
        constants = [unknown(over).constant]
    elif added:
        constants = [zeros_only(constant) for constant in constants]
    constant = torch.stack(torch.broadcast_tensors(*constants)).sum(0)
    return Units(merged.expand(shape), constant.expand(shape))
