"""What an op does to units: one function for each kind of op that leaves them apart.

Ops that only move elements are run on the labels themselves. Each rule takes a node, the `Units` of
each node among its arguments and the `Ties`, and gives Units, a list of them, or None where the
units cannot be followed. `mixing` has the rules of ops that mix units.
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
    constant = run_on(node, {source: constant.clone()}).to(torch.float64)
    return Units(labels, constant.expand(labels.shape))


def same(node: Node, units: Mapping[Node, Units], _ties: Ties) -> Units | None:
    """y has x's values, at most in another dtype, device or layout."""
    (source,) = units.values()
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
            constant = zeros_only(constant)
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
