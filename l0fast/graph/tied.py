"""Which units can only vanish together, whose they are, and why: what the rules write down."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.fx import Node

from l0fast.graph.nodes import op_in_words, op_name
from l0fast.graph.sites import Site
from l0fast.graph.units import STAYS, Units, narrowed

Reasons = dict[str, dict[str, Node | None]]
"""Layer -> reason -> the node of the op where it first arose, None where it says all by itself."""

OUTPUT = "the model's output"
"""The reason of units that leave the model."""


def _kind(reason: str) -> str:
    """A reason without the names in it: of each kind, one is told."""
    return re.sub("'[^']*'", "", reason).partition(" (")[0]


class Tied:
    """Units in classes.

    Args:
        names: of the layers.
        maker: unit -> the number of the layer that makes it, -1 for none.
        first_held: the first unit of tensors that belong to no layer: they come last.
        callers: node -> the module in whose forward it is.
    """

    classes: Tensor
    """Unit -> the class of units with which it exists or does not: the least of them."""

    def __init__(
        self, names: list[str], maker: Tensor, first_held: int, callers: Mapping[Node, str]
    ) -> None:
        self._names, self._maker, self.first_held = names, maker, first_held
        self._callers = callers
        self.stops: Reasons = {name: {} for name in names}
        """Why some units of a layer cannot vanish alone."""
        self.pins: Reasons = {name: {} for name in names}
        """Those of the reasons by which units were tied to what must stay."""
        self.at: Node | None = None
        """The node that is followed."""
        self._said: dict[Node, str] = {}
        """Node -> its op in words."""
        self._parent = torch.arange(len(maker))
        """Units form trees: a parent is a lesser unit of the class, or the unit itself."""

    def own(self) -> None:
        """Makes what it writes down from now on its own: of a copy, after copy.copy."""
        self._parent = self._parent.clone()
        self.stops, self.pins = (
            {name: dict(reasons) for name, reasons in of.items()} for of in (self.stops, self.pins)
        )

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        first, second = torch.broadcast_tensors(narrowed(first), narrowed(second))
        apart = first != second
        if not bool(apart.any()):
            return
        pairs = torch.stack([first[apart], second[apart]])
        at = self.at if self.at is not None and op_name(self.at) == reason else None
        for name in self.makers(pairs):
            self.stops[name].setdefault(reason, at)
        stay = self._roots(pairs) == STAYS
        for name in self.makers(pairs[~stay & stay.any(0)]):
            self.pins[name].setdefault(reason, at)
        while pairs.numel():
            roots = self._roots(pairs)
            self._parent[pairs] = roots  # the next search is short
            pairs = roots[:, roots[0] != roots[1]]
            least, other = torch.minimum(*pairs), torch.maximum(*pairs)
            self._parent.scatter_reduce_(0, other, least, "amin")

    def pin(self, labels: Tensor, reason: str) -> None:
        self.tie(labels, torch.tensor(STAYS), reason)

    def together(self, first: Tensor, second: Tensor) -> Tensor:
        return self._roots(first) == self._roots(second)

    def is_held(self, labels: Tensor) -> bool:
        return bool((narrowed(labels) >= self.first_held).all())

    def of_layers(self, units: Units) -> bool:
        """Whether units of layers are in a tensor."""
        return units.followed and not self.is_held(units.labels)

    def _roots(self, labels: Tensor) -> Tensor:
        """The least units of the classes of some units."""
        roots = self._parent[labels]
        while not torch.equal(roots, above := self._parent[roots]):
            roots = above
        return roots

    def join(self, name: str, arrive: list[Units | None]) -> list[Units]:
        """Ties the units that a layer reads in its several calls: it has one set of columns. Where
        not all can be followed, all must stay, and none are given."""
        followed = [units for units in arrive if units is not None]
        whole, reason = len(followed) == len(arrive), f"{name!r}, called {len(arrive)} times"
        for units in followed:
            self.tie(units.labels, followed[0].labels if whole else torch.tensor(STAYS), reason)
        return followed if whole else []

    def bind(
        self,
        sites: Iterable[Site],
        made: Mapping[str, Tensor],
        inputs: Mapping[str, Units | None],
    ) -> None:
        """Ties what an embedding makes to what the head reads that has the same weight."""
        embeddings: dict[int, Tensor] = {}
        bound = [site for site in sites if site.bound]
        for site in bound:
            if site.name in made and isinstance(site.layer, nn.Embedding):
                key = id(site.layer.weight)
                first = embeddings.setdefault(key, made[site.name])
                self.tie(made[site.name], first, "its weight is another embedding's")
        for site in bound:
            if isinstance(site.layer, nn.Embedding):
                continue
            units, rows = inputs.get(site.name), embeddings[id(site.layer._parameters["weight"])]
            reason = f"its weight is that of {site.name!r}"
            if units is None:
                self.pin(rows, reason)
            else:
                self.tie(rows, units.labels, reason)

    def _least(self) -> Tensor:
        """Unit -> the least unit of its class."""
        least = self._parent
        while not torch.equal(least, above := least[least]):
            least = above
        return least

    def makers(self, labels: Tensor) -> list[str]:
        """The layers that make some units."""
        found = torch.zeros(len(self._names) + 1, dtype=torch.bool)
        found[self._maker[labels]] = True  # -1 is behind the layers
        return [self._names[index] for index in found[:-1].nonzero().flatten().tolist()]

    def made_only_by(self, names: Collection[str], labels: Tensor) -> Tensor:
        """Those of some units that vanish with no unit of another layer than these."""
        least = self._least()
        other = torch.tensor([*(name not in names for name in self._names), False])
        shared = torch.zeros(len(least), dtype=torch.bool)
        shared[least[other[self._maker]]] = True
        return labels[~shared[least[labels]]]

    def in_words(self, node: Node) -> str:
        """The op of a node, with its module and its line of code."""
        if node not in self._said:
            self._said[node] = op_in_words(node, self._callers.get(node, ""))
        return self._said[node]

    def reasons(self, labels: Tensor) -> str:
        """Why those of some units that must stay do. Of what leaves the model: also the last op
        that ties it together."""
        pinned = labels[self.classes[labels] == self.classes[STAYS]]
        alone = "some of it comes from no layer that could get smaller" if len(pinned) else ""
        told = self._told(self.pins, pinned)
        if told != OUTPUT:
            return told or self._told(self.stops, pinned) or alone
        ties = [why for why in self._by_kind(self.stops, pinned) if why != OUTPUT]
        return f"{told}, tied together by {ties[-1]}" if ties else told

    def tied_by(self, labels: Tensor) -> str:
        """What keeps some units from vanishing alone."""
        return self._told(self.stops, labels)

    def _told(self, reasons: Reasons, labels: Tensor) -> str:
        return ", ".join(self._by_kind(reasons, labels))

    def _by_kind(self, reasons: Reasons, labels: Tensor) -> list[str]:
        """Reasons of the layers that make some units: of each kind the first, with its place."""
        found: dict[str, dict[str, Node | None]] = {}
        for name in self.makers(labels):
            for reason, node in reasons[name].items():
                found.setdefault(_kind(reason), {}).setdefault(reason, node)
        return [self._first(of) for of in found.values()]

    def _first(self, reasons: dict[str, Node | None]) -> str:
        """The first of some reasons of one kind, and how many more there are."""
        reason, node = next(iter(reasons.items()))
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        return (reason if node is None else self.in_words(node)) + more
