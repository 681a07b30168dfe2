"""What products of tensors do to units: matrix products, einsum and attention.

Units that are summed over can only vanish together. The rules are as those of `rules`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.fx import Node

from l0fast.graph.mixing import joined, mixed
from l0fast.graph.nodes import argument, op_name, shape_of
from l0fast.graph.units import Ties, Units, reshaped, unknown


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
        alone = mixed(labels, summed, name, ties).permute(
            *summed, *(term.index(letter) for letter in result if letter in term)
        )
        here = [size if letter in term else 1 for letter, size in size_of.items()]
        if math.prod(here) != alone.numel():  # broadcast
            return None
        terms.append(alone.reshape(here).expand(shape))
    return Units(joined(terms, shape, name, ties), unknown(shape).constant)


def _product(first: Tensor, second: Tensor, shape: Sequence[int], reason: str, ties: Ties) -> Any:
    """Labels of a matrix product; what it sums over vanishes together."""
    rows = mixed(first, [first.dim() - 1], reason, ties).expand(*first.shape[:-1], shape[-1])
    columns = mixed(second, [second.dim() - 2], reason, ties)
    columns = columns.expand(*second.shape[:-2], shape[-2], second.shape[-1])
    return joined([rows, columns], shape, reason, ties)


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
        weights = joined([weights, units[mask].labels], scores, name, ties)
    return Units(_product(weights, value, shape, name, ties), unknown(shape).constant)
