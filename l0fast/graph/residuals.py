"""The additions of a graph that may be those of residual branches: y = x + f(x)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from l0fast.graph.capture import Trace
from l0fast.graph.nodes import op_name, shape_of, writes_in_place

ADDS = ("aten::add", "aten::add_")
_DROPOUTS = ("aten::dropout", "aten::dropout_")


@dataclass(frozen=True, eq=False)
class Residual:
    """A branch in the graph."""

    add: Node
    last: Node
    """What f gives."""
    nodes: set[Node]
    """Of f."""
    sums: frozenset[Node]
    """The additions by which it gets to x, of which `add` is the first, and dropouts between."""


def only_for(last: Node) -> set[Node]:
    """A node, and all that is read for it alone."""
    found: set[Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function":
            continue
        users = (u for u in node.users if u.users or u.op == "output" or writes_in_place(u))
        if node is last or all(user in found for user in users):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def residuals(trace: Trace) -> Iterator[Residual]:
    """The branches of a graph, in its order."""
    for node in trace.nodes:
        parts: Any = node.args[:2]
        if op_name(node) not in ADDS or not all(isinstance(part, Node) for part in parts):
            continue
        if any(shape_of(part) != shape_of(node) for part in parts):
            continue
        for short, last in (parts, parts[::-1]):
            nodes = only_for(last) if len(last.users) == 1 else set[Node]()
            if _layers(trace, nodes) and _is_shortcut(trace, short, nodes):
                yield from _parts(trace, last, nodes, (node,))
                break


def _parts(
    trace: Trace, last: Node, nodes: set[Node], sums: tuple[Node, ...]
) -> Iterator[Residual]:
    """The branch that ends in a node; or those of which it is the sum, as where an attention and an
    MLP read the same: y = x + (f(x) + g(x))."""
    end, through = last, tuple[Node, ...]()
    while op_name(end) in _DROPOUTS and len(end.all_input_nodes[0].users) == 1:
        end, through = end.all_input_nodes[0], (end, *through)
    both: Any = end.args[:2] if op_name(end) in ADDS else ()
    inner = [
        (part, only_for(part))
        for part in both
        if isinstance(part, Node)
        and len(part.users) == 1
        and shape_of(part) == shape_of(last)
        and part in nodes
    ]
    if len(inner) == 2 and all(_layers(trace, some) for _, some in inner):
        for part, some in inner:
            yield from _parts(trace, part, some, (end, *through, *sums))
    else:
        yield Residual(sums[0], last, nodes, frozenset(sums))


def _layers(trace: Trace, nodes: set[Node]) -> int:
    return sum(node in trace.calls for node in nodes)


def _is_shortcut(trace: Trace, short: Node, branch: set[Node]) -> bool:
    """Whether a node is what a branch reads, or made of that alone without a layer."""
    read = _read(trace, branch)
    if short in read:
        return True
    nodes = only_for(short) if len(short.users) == 1 else set[Node]()
    own = _read(trace, nodes)
    return bool(own) and own <= read and not _layers(trace, nodes)


def _read(trace: Trace, nodes: set[Node]) -> set[Node]:
    """The nodes from which others read, without the parameters."""
    sources = {source for node in nodes for source in node.all_input_nodes} - nodes
    return {n for n in sources if n.op == "call_function" or n in trace.inputs}
