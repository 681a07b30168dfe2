"""What an op that mixes units does to them: one function for each kind of op.

Units that are mixed can only vanish together. The rules are as those of `rules`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from l0fast.graph.nodes import argument, op_name, shape_of
from l0fast.graph.rules import zeros_only
from l0fast.graph.units import Rule, Ties, Units, narrowed, reshaped, unknown, varying

# --- along dimensions of one tensor -------------------------------------------------------------


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
        constant = zeros_only(constant)
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
        _mixed(whole, [dim for dim in varying(whole) if part.shape[dim] > 1], reason, ties)


def _joined(parts: Sequence[Tensor], shape: Sequence[int], reason: str, ties: Ties) -> Tensor:
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
        part = part.view(*[1] * (len(shape) - part.dim()), *part.shape)
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
    labels = _joined([u.labels for u in units.values()], shape, op_name(node), ties)
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
