"""The sizes that a module writes out when it views or splits tensors, and what is left of them."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from l0fast.graph.liveness import Liveness
from l0fast.graph.mixing import in_groups
from l0fast.graph.nodes import argument, op_name
from l0fast.graph.units import Units, groups_of_dims, varying

KINDS = {
    "aten::reshape": "reshape",
    "aten::view": "reshape",
    "aten::_unsafe_view": "reshape",
    "aten::split": "split",
    "aten::split_with_sizes": "split",
}
"""Op that is called with sizes -> its kind."""


Size = int | tuple[int, int] | None
"""What is left of a size: a number; (after, before) where a batch lies in the same dimension, to
which it is in proportion; None along what has no units."""


class View(NamedTuple):
    """One call of such an op."""

    kind: str
    sizes: tuple[Size, ...]
    """What is left of the shape, or of the parts of a split."""
    smaller: bool
    """Whether less is left than there was."""


def _folded(live: Liveness, node: Node) -> dict[int, int]:
    """Dimension of what a reshape gives -> how many places without units lie in it, around the
    units: heads that are examples of a larger batch."""
    if KINDS.get(op_name(node)) != "reshape":
        return {}
    parts = [*live.walk.units(node.all_input_nodes[0]), *live.walk.units(node)]
    if len(parts) != 2 or not parts[0].labels.numel():
        return {}
    before, after = (part.labels.shape for part in parts)
    here, there = (varying(part.labels) for part in parts)
    found: dict[int, int] = {}
    for dims, into in groups_of_dims(before, after):
        first = next((dim for dim in here if dims.start <= dim < dims.stop), dims.start)
        number = math.prod(before[dims.start : first])
        along = next((dim for dim in there if into.start <= dim < into.stop), None)
        if number > 1 and along is not None and after[along] % number == 0:
            found[along] = number
    return found


def _share(after: int, before: int) -> tuple[int, int]:
    """Both in lowest terms."""
    divisor = math.gcd(after, before)
    return after // divisor, before // divisor


def views_of(live: Liveness, module: str, present: Tensor) -> list[View]:
    """The views and splits in a module's own forward, in the graph's order.

    Args:
        live: what is left of a model's units.
        module: its name.
        present: see `Liveness.present`.
    """
    found: list[View] = []
    trace = live.walk.trace
    for node in trace.nodes:
        kind = KINDS.get(op_name(node))
        if kind is None or trace.callers[node] != module:
            continue
        parts = live.walk.units(node)
        if not parts:
            found.append(View(kind, (), False))
            continue
        if kind == "split":
            dim: int = argument(node, 2, "dim", 0) % parts[0].labels.dim()
            pairs = [(part.labels.shape[dim], live.left(part, present, dim)) for part in parts]
            sizes = tuple(after for _, after in pairs)
        else:
            (units,) = parts
            shape, along = units.labels.shape, varying(units.labels)
            pairs = [(shape[dim], live.left(units, present, dim)) for dim in along]
            left = dict(zip(along, (after for _, after in pairs), strict=True))
            folded = _folded(live, node)
            sizes = tuple(
                _share(left[dim], shape[dim]) if dim in folded else left.get(dim)
                for dim in range(len(shape))
            )
        found.append(View(kind, sizes, any(after < before for before, after in pairs)))
    return found


def _sized(live: Liveness, node: Node) -> list[Units]:
    """The units of what a node reads and gives, in the shapes that it is told."""
    found = [units for one in (node, *node.all_input_nodes) for units in live.walk.units(one)]
    if op_name(node) == "aten::group_norm":
        found.append(in_groups(node, found[0]))
    return found


def sizes_in(live: Liveness, module: str, present: Tensor) -> set[tuple[int, int]]:
    """(before, after) of the sizes that change in what a module views, splits or slices.

    Args:
        live: what is left of a model's units.
        module: its name.
        present: see `Liveness.present`.
    """
    found: set[tuple[int, int]] = set()
    for node, _ in live.rigid([module]):
        for units in _sized(live, node):
            for dim, size in enumerate(units.labels.shape):
                left = live.left(units, present, dim)
                if left < size:
                    found.add((size, left))
        for dim, number in _folded(live, node).items():
            (units,) = live.walk.units(node)
            size, left = units.labels.shape[dim], live.left(units, present, dim)
            if left < size and left % number == 0:
                found.add((size // number, left // number))
    return found


def ends_in(live: Liveness, module: str, present: Tensor) -> set[tuple[int, int]]:
    """(before, after) of the places where a module cuts a tensor in two by a slice, counted from
    the end that the slice counts from; arguments as in `sizes_in`."""
    found: set[tuple[int, int]] = set()
    for node, _ in live.rigid([module]):
        sources = live.walk.units(node.all_input_nodes[0]) if node.all_input_nodes else []
        if op_name(node) != "aten::slice" or len(sources) != 1:
            continue
        labels, constant = sources[0].labels, sources[0].constant
        dim: int = argument(node, 1, "dim", 0) % labels.dim()
        size = labels.shape[dim]
        for end in (argument(node, 2, "start"), argument(node, 3, "end")):
            if type(end) is int and 0 < abs(end) < size:
                first = (size + end, -end) if end < 0 else (0, end)
                part = Units(*(one.narrow(dim, *first) for one in (labels, constant)))
                found.add((abs(end), live.left(part, present, dim)))
    return {(before, after) for before, after in found if after < before}


def parts_in(
    live: Liveness, module: str, present: Tensor
) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(before, after) of the sizes of all parts, where a module splits and some change; arguments
    as in `sizes_in`."""
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for node, _ in live.rigid([module]):
        parts = live.walk.units(node)
        for dim in range(parts[0].labels.dim()) if len(parts) > 1 else ():
            before = tuple(units.labels.shape[dim] for units in parts)
            after = tuple(live.left(units, present, dim) for units in parts)
            if after != before:
                found.add((before, after))
    return found
