"""What an op that mixes the units of a tensor does to them: one function for each kind of op.

Units that are mixed can only vanish together. The rules are as those of `rules`; `joins` has those
of ops on several tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from l0fast.graph.nodes import argument, op_name, shape_of
from l0fast.graph.rules import dims_of, elementwise, zeros_only
from l0fast.graph.units import Rule, Ties, Units, narrowed, unknown, varying


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
    for other in units.values():  # the numbers for each element, which is never gone alone
        if other is not source:
            ties.pin(other.labels, op_name(node))
    return Units(source.labels, unknown(source.labels.shape).constant)


def in_groups(node: Node, source: Units) -> Units:
    """The units that a group_norm reads, with the groups along dimension 1."""
    number: Any = node.args[1]
    parts = source.labels, source.constant
    return Units(*(part.unflatten(1, (number, -1)) for part in parts))


def group_norm(node: Node, units: Mapping[Node, Units], ties: Ties) -> Units | None:
    """Groups of channels that a function, not a layer, normalises: they go as wholes, where an
    attribute says how many there are."""
    source, *numbers = (units[one] for one in node.args if isinstance(one, Node))
    labels, groups = source.labels, in_groups(node, source)
    mixed(groups.labels, range(2, groups.labels.dim()), op_name(node), ties)
    for part in numbers:
        ties.tie(labels, part.labels.view(-1, *[1] * (labels.dim() - 2)), op_name(node))
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
