"""The sizes that a module writes out when it views or splits tensors, and what is left of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from l0fast.graph.liveness import Liveness
from l0fast.graph.nodes import argument, op_name
from l0fast.graph.units import varying

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
