"""What an op does to units: one function for each kind of op that leaves them apart.

Ops that only move elements are run on the labels themselves. Each rule takes a node, the `Units` of
each node among its arguments and the `Ties`, and gives Units, a list of them, or None where the
units cannot be followed. `mixing` and `joins` have the rules of ops that mix units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from l0fast.graph.nodes import argument, op_name, run_on, shape_of
from l0fast.graph.units import Rule, Ties, Units, narrowed, reshaped, unknown, varying


def zeros_only(constant: Tensor) -> Tensor:
    """Zeros stay, any other constant is no longer known."""
    constant = narrowed(constant)
    return constant.masked_fill(constant != 0, math.nan)


def elementwise(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """y = f(x) with the same f everywhere: a constant c becomes f(c)."""
    (source,) = units
    labels, constant = units[source].labels, narrowed(units[source].constant)
    known = run_on(node, {source: constant.clone()}).to(torch.float64)
    known = known.masked_fill(constant.isnan() | ~known.isfinite(), math.nan)
    return Units(labels, known.expand(labels.shape))


def same(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """y has x's values, at most in another dtype, device or layout."""
    (source,) = units.values()
    return replace(source, constant=zeros_only(source.constant).expand(source.labels.shape))


_FILLED = {"aten::zeros_like": 0.0, "aten::ones_like": 1.0}


def filled(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """A new tensor of x's shape: its size follows x's."""
    (source,) = units.values()
    value = _FILLED.get(op_name(node), argument(node, 1, "fill_value"))
    value = float(value) if isinstance(value, (int, float)) else math.nan
    constant = torch.tensor(value, dtype=torch.float64)
    return replace(source, constant=constant.expand(source.labels.shape))


def slope(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """prelu with one slope for all: 0 stays 0."""
    source, weight = (units[part] for part in node.args[:2])  # type: ignore[index]
    if weight.labels.numel() > 1:
        return None
    return replace(source, constant=zeros_only(source.constant).expand(source.labels.shape))


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
    if shape is not None and op_name(node) in ("aten::flip", "aten::roll"):
        return run_on(node, {source: narrowed(tensor) for source, tensor in of.items()}).expand(
            shape
        )
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


def roll(node: Node, units: Mapping[Node, Units], ties: Ties) -> Any:
    """Turns dimensions without units round: along others, what is left would be in another order
    than what was there."""
    (source,) = units.values()
    dims = node.args[2:3] or ([],)
    along = dims_of(dims[0], source.labels.dim())
    return None if set(along) & set(varying(source.labels)) else move(node, units, ties)


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
            constant = zeros_only(constant)
        if any(dim >= rank - dims for dim in varying(constant)):
            constant = unknown(()).constant
        result = Units(labels.expand(shape), constant.expand(shape))
        several = isinstance(node.meta["val"], (tuple, list))
        indices = Units(result.labels, unknown(shape).constant)
        return [result, indices] if several else result  # a pool may give indices too

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


def dims_of(given: Any, rank: int) -> list[int]:
    """A dim argument as a list of dims >= 0; all of them where none is given."""
    if given is None or given == [] or isinstance(given, bool):  # another overload's option
        return list(range(rank))
    return [dim % rank for dim in ([given] if isinstance(given, int) else given)]


# --- dimensions that become others ----------------------------------------------------------------


def gathered(dim: int) -> Rule:
    """pixel_unshuffle, im2col: a channel's places become channels, which lie one after another.

    Args:
        dim: that of the channels.
    """

    def rule(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
        (source,) = units.values()
        shape, rank = shape_of(node), source.labels.dim()
        found = source.along(dim % rank)
        if shape is None or found is None:
            return None
        after = dim % rank
        times = shape[after] // source.labels.shape[after]
        place = [-1] + [1] * (len(shape) - 1 - after)
        labels, constant = (
            part.repeat_interleave(times).view(place).expand(shape)
            for part in (found.labels, zeros_only(found.constant).expand(found.labels.shape))
        )
        return Units(labels, constant)

    return rule


def shuffled(dim: int) -> Rule:
    """pixel_shuffle, col2im: channels that lie one after another become the places of one, which
    vanish together.

    Args:
        dim: that of the channels.
    """

    def rule(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
        (source,) = units.values()
        shape, found = shape_of(node), source.along(dim % source.labels.dim())
        if shape is None or found is None:
            return None
        constant = found.constant
        if op_name(node) == "aten::col2im":  # places that overlap are summed
            constant = zeros_only(constant).expand(constant.shape)
        labels, constant = (part.view(shape[-3], -1) for part in (found.labels, constant))
        ties.tie(labels, labels[:, :1], op_name(node))
        same = (constant == constant[:, :1]).all(1)
        constant = constant[:, 0].masked_fill(~same, math.nan)
        return Units(*(part[..., None, None].expand(shape) for part in (labels[:, 0], constant)))

    return rule


# --- with an index ------------------------------------------------------------------------------


def rows(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """embedding: picks rows of a table, which has its units along its columns."""
    table, index = (units[part] for part in node.args[:2])  # type: ignore[index]
    shape, found = shape_of(node), table.along(1)
    if shape is None or found is None or index.followed or not table.followed:
        return None
    return Units(found.labels.expand(shape), found.constant.expand(shape))


def taken(node: Any, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """x[:, index], index_select: takes places along dimensions without units."""
    source, index, *rest = node.args
    labels, constant = narrowed(units[source].labels), narrowed(units[source].constant)
    shape = shape_of(node)
    if rest:  # one dimension, and its index
        index = [*[None] * (index % labels.dim()), *rest]
    dims = [dim for dim, part in enumerate(index) if part is not None]
    if shape is None or dims != list(range(dims[0], dims[-1] + 1)):
        return None
    if any(units[index[dim]].followed or labels.shape[dim] > 1 for dim in dims):
        return None
    if any(constant.shape[dim] > 1 for dim in dims):
        constant = unknown(labels.shape).constant
    new = [1] * (len(shape) - labels.dim() + len(dims))
    return Units(
        *(
            part.reshape(*part.shape[: dims[0]], *new, *part.shape[dims[-1] + 1 :]).expand(shape)
            for part in (labels, constant)
        )
    )
