"""One graph for a forward that slices only for some sizes, as after a padding.

torch.fx follows one path through a forward. Here every path is followed. Where two paths differ,
the graph computes both and takes the one that the sizes ask for. They may differ in slices and
comparisons alone, which fail for no size.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

MOST_DECISIONS = 4

_COMPARISONS = {operator.gt, operator.ge, operator.lt, operator.le, operator.eq, operator.ne}
_NUMBERS = {operator.add, operator.sub, operator.mul, operator.mod, operator.floordiv}
"""What a forward may ask whether it is true: it gives a bool, or a number."""

_HARMLESS: set[Any] = {"contiguous", torch.atleast_1d, *_COMPARISONS}
"""What may be computed where it is not asked for, beside slices."""

Path = tuple[fx.Graph, list[str]]
"""The graph of one path, and the names of the nodes that were asked whether they are true."""


def one_graph(follow: Callable[[Sequence[bool]], Path], decided: tuple[bool, ...] = ()) -> fx.Graph:
    """The graph of a forward, of all its paths.

    Args:
        follow: gives the path that takes these decisions first. Further decisions are False.
        decided: the first decisions.

    Raises:
        ValueError: paths differ in more than slices, or there are too many.
        Exception: whatever torch.fx raises.
    """
    graph, asked = follow(decided)
    if len(asked) == len(decided):
        return graph
    if len(decided) >= MOST_DECISIONS:
        raise ValueError("its forward decides too often")
    no, yes = (one_graph(follow, (*decided, one)) for one in (False, True))
    return _joined(no, yes, asked[len(decided)])


def _same(one: fx.Node, other: fx.Node) -> bool:
    """Whether two nodes do the same, to whatever nodes they are given."""

    def form(node: fx.Node) -> Any:
        return map_arg((node.args, node.kwargs), lambda _: None)

    alike = (one.op, one.target) == (other.op, other.target) and form(one) == form(other)
    return alike and len(_given(one)) == len(_given(other))


def _given(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in order, as often as they are there."""
    found: list[fx.Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return found


def _is_harmless(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source: Any = node.args[0]
        index = node.args[1]
        parts = index if isinstance(index, tuple) else (index,)
        slices = all(isinstance(part, slice) for part in parts)
        return slices or source.target is torch.atleast_1d
    return node.target in _HARMLESS


def _ends(no: list[fx.Node], yes: list[fx.Node]) -> tuple[int, int]:
    """How many nodes two paths have in common in the beginning, and how many in the end."""
    first, last, most = 0, 0, min(len(no), len(yes))
    place = {node: index for index, node in enumerate(no)} | {
        node: index for index, node in enumerate(yes)
    }
    while (
        first < most
        and _same(no[first], yes[first])
        and [place[one] for one in _given(no[first])] == [place[one] for one in _given(yes[first])]
    ):
        first += 1
    while last < most - first and _same(no[-1 - last], yes[-1 - last]):
        last += 1
    return first, last


def _joined(no: fx.Graph, yes: fx.Graph, asked: str) -> fx.Graph:
    """The graph that computes two paths, and takes what they differ in by what is asked."""
    paths = list(no.nodes), list(yes.nodes)
    first, last = _ends(*paths)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for one, other in zip(*(path[:first] for path in paths), strict=True):
        new[one] = new[other] = graph.node_copy(one, new.__getitem__)
    for path in paths:
        for node in path[first : len(path) - last]:
            if not _is_harmless(node):
                raise ValueError(f"its forward decides by {asked} whether it calls {node.target}")
            new[node] = graph.node_copy(node, new.__getitem__)
    condition = next(node for node in paths[0] if node.name == asked)
    if condition.target not in _COMPARISONS | _NUMBERS:
        raise ValueError(f"its forward decides by {asked}, which may be no number")
    chosen = new[condition]
    if condition.target in _NUMBERS:
        chosen = graph.call_function(operator.ne, (chosen, 0))
    taken: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def of_both(one: fx.Node, other: fx.Node) -> fx.Node:
        both = new[one], new[other]
        if both[0] is both[1]:
            return both[0]
        if both not in taken:
            # It gives both as they are, and torch.fx can follow it again, as it does to unpickle.
            pair = graph.call_function(torch.atleast_1d, both)
            taken[both] = graph.call_function(operator.getitem, (pair, chosen))
        return taken[both]

    for one, other in zip(*(path[len(path) - last :] for path in paths), strict=True):
        given = iter([*map(of_both, _given(one), _given(other))])
        new[one] = new[other] = graph.node_copy(one, lambda _, given=given: next(given))
    return graph
