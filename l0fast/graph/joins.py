"""What an op on several tensors does to their units: one function for each kind of op.

What lies at the same place, or is summed over, can only vanish together. The rules are as those of
`rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from l0fast.graph.mixing import mixed
from l0fast.graph.nodes import argument, op_name, shape_of
from l0fast.graph.rules import zeros_only
from l0fast.graph.units import Ties, Units, narrowed, reshaped, unknown, varying


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
    for part in sorted(parts, key=ties.is_held):  # the result has the units of layers
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
    labels = _joined([u.labels for u in units.values()], shape, op_name(node), ties)
    constant = unknown(shape).constant
    kind = op_name(node).removeprefix("aten::").removesuffix("_")
    if kind in ("add", "sub", "mul"):
        narrow = {source: narrowed(value.constant).clone() for source, value in units.items()}
        first, second = map_arg(node.args[:2], narrow.__getitem__)  # type: ignore[misc]
        operands: Any = first, second
        if kind == "mul":
            constant = torch.mul(*operands)
            for source, factor in narrow.items():
                if not ties.is_held(units[source].labels):  # what a module holds may be trained
                    constant = torch.where(factor == 0, 0.0, constant)
        else:
            function: Any = torch.add if kind == "add" else torch.sub
            constant = function(*operands, alpha=node.kwargs.get("alpha", 1))
    return Units(labels, constant.expand(shape))


def shaped_like(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """expand_as, reshape_as, view_as: x's values, in the shape of another tensor."""
    source, other = (units[part] for part in node.args[:2])  # type: ignore[index]
    labels, constant, shape = source.labels, source.constant, tuple(other.labels.shape)
    if op_name(node) != "aten::expand_as":
        labels, constant = reshaped(labels, shape), reshaped(constant, shape)
    labels = _joined([labels, other.labels], shape, op_name(node), ties)
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
    joined = _joined(labels, over, op_name(node), ties)
    constants = [narrowed(part.constant) for part in (source, *added)]
    if any(constant.shape[dim] > 1 for constant in constants):
        constants = [unknown(over).constant]
    elif added:
        constants = [zeros_only(constant) for constant in constants]
    constant = torch.stack(torch.broadcast_tensors(*constants)).sum(0)
    return Units(joined.expand(shape), constant.expand(shape))


def _letters(given: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The dimensions that an einsum's equation names: of its operands and of its result."""
    before, arrow, after = given.replace(" ", "").partition("->")
    terms = before.split(",")
    plain = arrow and all(part.isalpha() or not part for part in (*terms, after))
    if not plain or any(len(set(part)) < len(part) for part in (*terms, after)):
        return None
    return (terms, after) if [len(term) for term in terms] == list(ranks) else None


def einsum(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """Products that are summed: as in a matrix product, what it sums over vanishes together."""
    parts = [units[part].labels for part in node.args[1]]  # type: ignore[index,union-attr]
    found = _letters(node.args[0], [part.dim() for part in parts])  # type: ignore[arg-type]
    shape, name = shape_of(node), op_name(node)
    if found is None or shape is None:
        return None
    result = found[1]
    size_of = dict(zip(result, shape, strict=True))
    terms: list[Tensor] = []
    for labels, term in zip(parts, found[0], strict=True):
        summed = [dim for dim, letter in enumerate(term) if letter not in result]
        part = mixed(labels, summed, name, ties).permute(
            *summed, *(term.index(letter) for letter in result if letter in term)
        )
        here = [size if letter in term else 1 for letter, size in size_of.items()]
        if math.prod(here) != part.numel():  # broadcast
            return None
        terms.append(part.reshape(here).expand(shape))
    return Units(_joined(terms, shape, name, ties), unknown(shape).constant)


def _product(first: Tensor, second: Tensor, shape: Sequence[int], reason: str, ties: Ties) -> Any:
    """Labels of a matrix product; what it sums over vanishes together."""
    rows = mixed(first, [first.dim() - 1], reason, ties).expand(*first.shape[:-1], shape[-1])
    columns = mixed(second, [second.dim() - 2], reason, ties)
    columns = columns.expand(*second.shape[:-2], shape[-2], second.shape[-1])
    return _joined([rows, columns], shape, reason, ties)


def matmul(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """y = a @ b, of at least two dimensions each."""
    first, second = (units[source].labels for source in node.args[:2])  # type: ignore[index]
    shape = shape_of(node)
    if shape is None or first.dim() < 2 or second.dim() < 2:
        return None
    return Units(_product(first, second, shape, op_name(node), ties), unknown(shape).constant)


def added_product(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """baddbmm: y = beta * x + alpha * a @ b."""
    added, first, second = (units[source].labels for source in node.args[:3])  # type: ignore[index]
    name, shape = op_name(node), shape_of(node)
    if shape is None:
        return None
    made = _product(first, second, shape, name, ties)
    return Units(_joined([added, made], shape, name, ties), unknown(shape).constant)


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
