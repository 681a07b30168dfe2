"""One walk along a model's graph: where each unit lies, and which can only vanish together.

A unit is an output of a layer. Batch norms, and convolutions in groups, pass units on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from l0fast.graph.capture import LAYERS, Trace, is_carrier, is_norm, kind_of
from l0fast.graph.channels import IGNORED, rule_for
from l0fast.graph.nodes import op_name, shape_of, writes_in_place
from l0fast.graph.sites import Site
from l0fast.graph.units import STAYS, Units, narrowed, unknown, varying


def _along(units: Units, dim: int) -> Units | None:
    """The units along one dimension, as vectors, if they vary along no other."""
    vectors: list[Tensor] = []
    for values in (units.labels, units.constant):
        if any(other != dim for other in varying(values)):
            return None
        narrow = narrowed(values)
        vectors.append(
            narrow.expand(*narrow.shape[:dim], values.shape[dim], *narrow.shape[dim + 1 :])
        )
    return Units(*(vector.flatten() for vector in vectors))


class Walk:
    """One walk along the graph, and the units that it found.

    Args:
        trace: the export of the model whose layers the sites are.
        sites: every Linear, convolution and batch norm of the model.
    """

    def __init__(self, trace: Trace, sites: Iterable[Site]) -> None:
        self.trace = trace
        self.sites = {site.name: site for site in sites}
        self.made: dict[str, Tensor] = {}
        """Layer -> the units that it makes."""
        total = STAYS + 1
        makers: list[Tensor] = [torch.full((1,), -1)]
        for index, site in enumerate(self.sites.values()):
            if not is_carrier(site.layer):
                size = len(site.writes)
                self.made[site.name] = torch.arange(total, total + size)
                makers.append(torch.full((size,), index))
                total += size
        self._maker = torch.cat(makers)
        self._names = list(self.sites)
        self.tainted = torch.zeros(total, dtype=torch.bool)
        """Units that are no longer sure to be zero where they were."""
        self.restless = torch.zeros(total, dtype=torch.bool)
        """Units that are no longer sure to be the constants that they were."""
        self.stops: dict[str, list[str]] = {name: [] for name in self.sites}
        self.values: dict[Node, Any] = {}
        """Node -> the units of its tensor, or of several."""
        self.lost: dict[Node, str] = {}
        """Node -> why no unit of a layer is in it."""
        self.inputs: dict[str, Units | None] = {}
        """Layer -> the units along its inputs, if they are only there."""
        self.outputs: dict[str, Tensor] = {}
        """Layer -> the units along its outputs."""
        self.sources: dict[str, str] = {}
        """Layer -> where its inputs come from, if they could not be followed."""
        self._edges: list[Tensor] = []
        self._run()
        self.classes = self._components()
        """Unit -> the class of units with which it exists or does not."""

    # --- what the rules write down ------------------------------------------------------------

    def tie(self, first: Tensor, second: Tensor, reason: str) -> None:
        first, second = torch.broadcast_tensors(narrowed(first), narrowed(second))
        pairs = torch.stack([first.flatten(), second.flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel():
            self._edges.append(pairs.unique(dim=1))
            for name in self.makers(pairs):
                if reason not in self.stops[name]:
                    self.stops[name].append(reason)

    def pin(self, labels: Tensor, reason: str) -> None:
        self.tie(labels, torch.tensor(STAYS), reason)

    def makers(self, labels: Tensor) -> list[str]:
        """The layers that make some units."""
        found = self._maker[labels.unique()].unique().tolist()
        return [self._names[index] for index in found if index >= 0]

    def reasons(self, labels: Tensor) -> str:
        """Why those of some units that must stay do."""
        pinned = labels[self.classes[labels] == self.classes[STAYS]]
        stops = [reason for name in self.makers(pinned) for reason in self.stops[name]]
        return ", ".join(dict.fromkeys(stops))

    def _components(self) -> Tensor:
        classes = torch.arange(len(self._maker))
        edges = torch.cat([torch.empty(2, 0, dtype=torch.int64), *self._edges], 1)
        while True:
            least = classes[edges].amin(0)
            following = classes.clone()
            for end in edges:  # the class's own number takes part, so that classes merge as wholes
                following.scatter_reduce_(0, classes[end], least, "amin")
                following.scatter_reduce_(0, end, least, "amin")
            following = following[following]
            if torch.equal(following, classes):
                return classes
            classes = following

    # --- the walk -----------------------------------------------------------------------------

    def _run(self) -> None:
        for node in self.trace.graph.nodes:
            if node in self.trace.calls:
                self._call(node, self.sites[self.trace.calls[node]])
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._pin_node(source, "the model's output")
            elif node.op == "call_function":
                self._op(node)
            else:
                known = node.name in self.trace.inputs
                self._lose(node, f"the model's input {node.name!r}" if known else "a constant")

    def units(self, node: Node) -> list[Units]:
        """The units of what a node gives: a tensor, or several."""
        value = self.values.get(node, [])
        return value if isinstance(value, list) else [value]

    def _pin_node(self, node: Node, reason: str) -> None:
        for units in self.units(node):
            self.pin(units.labels, reason)

    def _lose(self, node: Node, reason: str) -> None:
        self.lost[node] = reason
        value: Any = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            self.values[node] = [unknown(part.shape) for part in value if isinstance(part, Tensor)]
        elif shape_of(node) is not None:
            self.values[node] = unknown(value.shape)

    def _call(self, node: Node, site: Site) -> None:
        """A layer's own call: reads the units of its input, makes others or passes them on."""
        source: Any = node.args[0]
        inner = LAYERS.get(kind_of(site.layer), 0)
        shape, made = shape_of(source), shape_of(node)
        units, lost = None, self.lost.get(source, "")
        calls = self.trace.counts[site.name]
        if shape is not None and source in self.values:
            dim = 1 if is_norm(site.layer) else len(shape) - 1 - inner
            units = _along(self.values[source], dim)
            if units is None:
                lost = f"{site.name!r}, along another dimension"
                self._pin_node(source, lost)
        reason = site.fixed or (f"called {calls} times" if calls != 1 else "")
        if reason:
            self._pin_node(source, f"{site.name!r}, which is kept as it is ({reason})")
        self.inputs[site.name], self.sources[site.name] = units, lost
        if made is None or calls != 1:
            self._lose(node, f"{site.name!r}")
            return
        labels, constant = self._output(site, units)
        self.outputs[site.name] = labels
        dim = 1 if is_norm(site.layer) else len(made) - 1 - inner
        place = [1] * dim + [-1] + [1] * (len(made) - 1 - dim)
        self.values[node] = Units(
            labels.view(place).expand(made), constant.view(place).expand(made)
        )
        if not bool((labels != STAYS).any()):
            self.lost[node] = lost or f"{site.name!r}"
        if site.fixed:
            self.pin(labels, site.fixed)

    def _output(self, site: Site, units: Units | None) -> tuple[Tensor, Tensor]:
        """The units that a layer's outputs are, and their constants, as vectors."""
        layer: Any = site.layer
        size = len(site.writes)
        nothing = unknown((size,)).constant
        if is_norm(layer):
            if units is None:
                return unknown((size,)).labels, nothing
            weight = 1.0 if layer.weight is None else layer.weight.detach().cpu().double()
            bias = 0.0 if layer.bias is None else layer.bias.detach().cpu().double()
            mean, variance = layer.running_mean.cpu().double(), layer.running_var.cpu().double()
            scale = weight / (variance + layer.eps).sqrt()
            return units.labels, (units.constant - mean) * scale + bias
        if not is_carrier(layer):
            return self.made[site.name], torch.where(site.writes, nothing, 0.0)
        if units is None:
            return unknown((size,)).labels, nothing
        groups = units.labels.view(layer.groups, -1)
        self.tie(groups, groups[:, :1], f"the groups of {site.name!r}")
        repeats = size // layer.groups
        # Outputs of silent inputs are their biases.
        silent = (units.constant == 0).view(layer.groups, -1).all(1).repeat_interleave(repeats)
        constant = torch.where(silent, site.bias(), nothing)
        return groups[:, 0].repeat_interleave(repeats), torch.where(site.writes, constant, 0.0)

    def _op(self, node: Node) -> None:
        """Any other op: its rule, or the end of what flows into it."""
        name, sources = op_name(node), node.all_input_nodes
        if name == "getitem":
            self._item(node)
            return
        if name in IGNORED or not sources or any(s not in self.values for s in sources):
            for source in sources:
                self._pin_node(source, name)
            self._lose(node, name)
            return
        rule, units = rule_for(node), {source: self.values[source] for source in sources}
        whole = all(isinstance(value, Units) for value in units.values())
        after: Any = rule(node, units, self) if rule is not None and whole else None
        if after is None:
            for source in sources:
                self._pin_node(source, name)
            self._lose(node, name)
            if writes_in_place(node):
                self.tainted[:] = True
            return
        self.values[node] = after
        if not any(bool((part.labels != STAYS).any()) for part in self.units(node)):
            self.lost[node] = self._lost(node)
        if writes_in_place(node):  # other views of the same memory no longer hold what they did
            before = units[sources[0]]
            was, now = narrowed(before.constant), narrowed(after.constant)
            for marks, changed in (
                (self.tainted, (was == 0) & (now != 0)),
                (self.restless, (was == was) & (now != was) & self._seen_elsewhere(sources[0])),
            ):
                marks[before.labels[changed.expand(before.labels.shape)].unique()] = True
            if bool((before.labels == STAYS).any()):  # perhaps a view of what was followed
                zeros = Units(before.labels, torch.zeros_like(before.constant))
                zero: Any = rule and rule(node, {**units, sources[0]: zeros}, self)
                self.tainted |= bool((zero.constant != 0).any())

    def _seen_elsewhere(self, node: Node) -> bool:
        """Whether what is written into a node may be read by another way than from the writer."""
        fresh = node in self.trace.calls or op_name(node) == "aten::cat"
        return len(node.users) > 1 or not fresh

    def _lost(self, node: Node) -> str:
        """Why an op gives no unit, where none of its inputs has any."""
        sources = node.all_input_nodes
        if any(bool((part.labels != STAYS).any()) for s in sources for part in self.units(s)):
            return op_name(node)
        return next((self.lost[source] for source in sources if source in self.lost), op_name(node))

    def _item(self, node: Node) -> None:
        source: Any = node.args[0]
        parts, index = self.units(source), node.args[1]
        if not isinstance(index, int) or not -len(parts) <= index < len(parts):
            self._pin_node(source, "getitem")
            self._lose(node, "getitem")
            return
        self.values[node] = parts[index]
        if source in self.lost:
            self.lost[node] = self.lost[source]
