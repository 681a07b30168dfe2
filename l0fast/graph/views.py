"""The sizes that a module writes out when it views or splits tensors, and what is left of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.fx import Node

from l0fast.graph.liveness import Liveness
from l0fast.graph.mixing import in_groups
from l0fast.graph.nodes import argument, op_name
from l0fast.graph.units import Units, varying

KINDS = {
    "aten::reshape": "reshape",
    "aten::view": "reshape",
    "aten::_unsafe_view": "reshape",
    "aten::split": "split",
    "aten::split_with_sizes": "split",
}
"""Op that is called with sizes -> its kind."""


class View(NamedTuple):
    """One call of such an op."""

    kind: str
    sizes: tuple[int | None, ...]
    """What is left of the shape, or of the parts of a split; None along what has no units."""
    smaller: bool
    """Whether less is left than there was."""


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
            sizes = tuple(left.get(dim) for dim in range(len(shape)))
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
    return found


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
