"""One walk along a model's graph: where each unit lies, and which can only vanish together.

A unit is an output of a layer. Norms of channels, slopes and convolutions in groups pass units on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from l0fast import _checks
from l0fast.graph.capture import Trace, input_place, is_carrier, is_channelwise
from l0fast.graph.carriers import passed_on
from l0fast.graph.channels import IGNORED, rule_for
from l0fast.graph.followed import Followed
from l0fast.graph.nodes import op_name, shape_of, writes_in_place
from l0fast.graph.overwritten import overwritten
from l0fast.graph.recurrent import beside_input
from l0fast.graph.sites import UNREAD, Site, is_held
from l0fast.graph.tensors import InputWeight
from l0fast.graph.tied import OUTPUT
from l0fast.graph.units import STAYS, Units, grids_of, in_all, unknown
from l0fast.layers.dense_types import inner_dims


class Walk(Followed):
    """One walk along the graph, and the units that it found.

    Args:
        trace: the export of the model whose layers the sites are.
        sites: every layer of the model that can be made smaller.
        untold: carriers of whose constants nothing is to be known.
    """

    def __init__(self, trace: Trace, sites: Iterable[Site], untold: Collection[str] = ()) -> None:
        self.trace = trace
        self.sites = {site.name: site for site in sites}
        self.made: dict[str, Tensor] = {}
        """Layer -> the units that it makes."""
        total = STAYS + 1
        makers: list[Tensor] = [torch.full((1,), -1)]
        for index, site in enumerate(self.sites.values()):
            size = len(site.writes)
            if not (is_carrier(site.layer) or is_held(site)):
                self.made[site.name] = torch.arange(total, total + size)
                makers.append(torch.full((size,), index))
                total += size
        first_held = total
        self.outputs: dict[str, Tensor] = {}
        """Layer -> the units along its outputs."""
        for site in filter(is_held, self.sites.values()):
            self.outputs[site.name] = torch.arange(total, total + len(site.writes))
            total += len(site.writes)
        self._filled: dict[Node, Tensor] = {}
        """Node that fills a new tensor -> the units along its dimension that an attribute tells."""
        for node, dim in trace.filled.items():
            self._filled[node] = torch.arange(total, total + node.meta["val"].shape[dim])
            total += len(self._filled[node])
        makers.append(torch.full((total - first_held,), -1))
        super().__init__(list(self.sites), torch.cat(makers), first_held, trace.callers)
        self.untold = frozenset(untold)
        """Carriers of whose constants nothing is known."""
        self.values, self.lost = {}, {}
        self.inputs: dict[str, Units | None] = {}
        """Layer -> the units along its inputs, if they are only there."""
        self.sources: dict[str, str] = {}
        """Layer -> where its inputs come from, if they could not be followed."""
        self._arrive: dict[Node, Units | None] = {}
        """A layer's own call -> the units along its inputs."""
        self._written: dict[Node, tuple[Tensor, Tensor]] = {}
        """Node that writes in place -> what it adds to `tainted`, and to `restless`."""
        for node in self.trace.nodes:
            self._visit(node)
        self._finish()
        everywhere = (part for node in self.values for part in self.units(node))
        self.grids = grids_of(everywhere, self.classes)
        """Classes of the units of each tensor that has them along several dimensions."""

    def again(self, writes: Mapping[str, Tensor], untold: Collection[str] | None = None) -> Walk:
        """The same walk with other gates: only what changes by them is followed anew.

        Args:
            writes: layer -> bool [out]: outputs that its gates leave open, where they are others.
            untold: carriers of whose constants nothing is to be known; as before by default.
        """
        walk = copy.copy(self)
        walk.untold = self.untold if untold is None else frozenset(untold)
        walk.own()
        walk.sites = {
            name: replace(site, writes=writes[name]) if name in writes else site
            for name, site in self.sites.items()
        }
        for kept in ("values", "lost", "inputs", "outputs", "sources", "_arrive", "_written"):
            setattr(walk, kept, dict(getattr(self, kept)))
        changed: set[Node] = set()
        others = walk.untold ^ self.untold
        for node in self.trace.nodes:
            name = self.trace.calls.get(node) or self.trace.held.get(node, "")
            if (
                name not in others
                and changed.isdisjoint(node.all_input_nodes)
                and (name not in writes or torch.equal(writes[name], self.sites[name].writes))
            ):
                continue
            for found in (walk.values, walk.lost, walk._written):
                found.pop(node, None)
            walk._visit(node)
            before, after = self.units(node), walk.units(node)
            if len(before) != len(after) or not all(map(Units.same_as, before, after)):
                changed.add(node)
        if torch.equal(walk._parent, self._parent):
            walk._parent = self._parent  # one copy is enough
        walk._finish()
        return walk

    def _finish(self) -> None:
        """Sums up what the nodes did."""
        unread = self.trace.unread
        for name in unread & self.outputs.keys():  # they may be read in training
            self.pin(self.made_only_by(unread, self.outputs[name]), UNREAD)
        several: dict[str, list[Units]] = {}  # layer called again -> its inputs, by call
        for name, number in self.trace.counts.items():
            if number > 1:
                calls = [node for node, called in self.trace.calls.items() if called == name]
                several[name] = self.join(name, [self._arrive[node] for node in calls])
        self.bind(self.sites.values(), self.made, self.inputs)
        self.classes = self._parent = self._least()
        self.tainted, self.restless = torch.zeros(2, len(self._maker), dtype=torch.bool)
        """Units that are no longer sure to be zero where they were, and that are no longer sure to
        be the constants that they were."""
        for tainted, restless in self._written.values():
            self.tainted[tainted], self.restless[restless] = True, True
        for name, calls in several.items():
            self.inputs[name] = in_all(calls, self.tainted | self.restless) if calls else None

    # --- the walk -----------------------------------------------------------------------------

    def _visit(self, node: Node) -> None:
        self.at = node
        if node in self.trace.calls:
            self._call(node, self.sites[self.trace.calls[node]])
        elif node.op == "output":
            for source in node.all_input_nodes:
                self._pin_node(source, OUTPUT)
        elif node in self._filled:
            nothing, dim = unknown(node.meta["val"].shape), self.trace.filled[node]
            labels = self._filled[node].view(-1, *[1] * (nothing.labels.dim() - 1 - dim))
            self.values[node] = replace(nothing, labels=labels.expand(nothing.labels.shape))
        elif self._reads_by_sites(node):
            self._recur(node)
        elif node.op == "call_function":
            self._op(node)
        elif self.trace.held.get(node) in self.sites:
            self._hold(node, self.sites[self.trace.held[node]])
        else:
            self._lose(node, self.trace.in_words(node))

    def _hold(self, node: Node, site: Site) -> None:
        """A tensor with a number for each channel: it has units of its own, which go with those of
        what it is put together with."""
        held: Any = site.layer
        if site.name not in self.inputs:
            self.inputs[site.name], self.sources[site.name] = None, ""
        if isinstance(held, InputWeight):  # its op reads for it
            self.values[node] = unknown(held.tensor.shape)
            return
        labels, values = held.over(self.outputs[site.name]), held.values()
        nothing = unknown(values.shape).constant
        self.values[node] = Units(labels, nothing if site.name in self.untold else values)
        if site.fixed:
            self.pin(labels, site.fixed)

    def _read(self, node: Node, site: Site) -> Units | None:
        """The units along the inputs of a layer, in its own call."""
        source: Any = node.args[input_place(site.layer)]
        inner, shape = inner_dims(site.layer) or 0, shape_of(source)
        units, lost = None, self.lost.get(source, "")
        if shape and source in self.values and not isinstance(site.layer, nn.Embedding):
            dim = 1 if is_channelwise(site.layer) else len(shape) - 1 - inner
            units = self.values[source].along(dim)
            if units is None or self.is_held(units.labels):
                lost = self.lost.get(source) or self.trace.in_words(source)
                for name in self.makers(self.values[source].labels)[:1]:
                    lost = f"{name!r}, whose units do not lie along dimension {dim} alone"
                self._pin_node(source, f"{site.name!r}, along another dimension")
                units = None
            else:  # what the model itself puts there is no constant that closed gates leave
                own = units.labels >= self.first_held
                units = replace(units, constant=units.constant.masked_fill(own, math.nan))
        if site.fixed:
            self._pin_node(source, f"{site.name!r}, which is kept as it is ({site.fixed})")
        self.inputs[site.name], self.sources[site.name] = units, lost
        return units

    def _call(self, node: Node, site: Site) -> None:
        """A layer's own call: reads the units of its input, makes others or passes them on."""
        self._arrive[node] = units = self._read(node, site)
        inner, made = inner_dims(site.layer) or 0, shape_of(node)
        if made is None:
            self._lose(node, f"{site.name!r}")
            return
        labels, constant = self._output(site, units)
        self.outputs[site.name] = labels
        dim = 1 if is_channelwise(site.layer) else len(made) - 1 - inner
        place = [1] * dim + [-1] + [1] * (len(made) - 1 - dim)
        self.values[node] = Units(
            labels.view(place).expand(made), constant.view(place).expand(made)
        )
        if not bool((labels != STAYS).any()):
            self.lost[node] = self.sources[site.name] or f"{site.name!r}"
        if site.fixed:
            self.pin(labels, site.fixed)

    def _reads_by_sites(self, node: Node) -> bool:
        """Whether a node is a recurrent layer's own call, whose input weights are sites."""
        names = self.trace.recurrent.get(node, ())
        return bool(names) and all(name in self.sites for name in names)

    def _recur(self, node: Node) -> None:
        """A recurrent layer's own call: reads the units of its input, and gives none."""
        for name in self.trace.recurrent[node]:
            self._read(node, self.sites[name])
            self.pin(self.outputs[name], op_name(node))
        for other in beside_input(node):
            self._pin_node(other, op_name(node))
        self._lose(node, self.in_words(node))

    def _output(self, site: Site, units: Units | None) -> tuple[Tensor, Tensor]:
        """The units that a layer's outputs are, and their constants, as vectors."""
        nothing = unknown((len(site.writes),))
        if not is_carrier(site.layer):
            return self.made[site.name], torch.where(site.writes, nothing.constant, 0.0)
        if units is None:
            return nothing.labels, nothing.constant
        return passed_on(site, units, self, site.name in self.untold)

    def _op(self, node: Node) -> None:
        """Any other op: its rule, or the end of what flows into it."""
        name, sources = op_name(node), node.all_input_nodes
        if name == "getitem":
            return self._item(node)
        if name in IGNORED:
            return
        if not sources or any(s not in self.values for s in sources):
            for source in sources:
                self._pin_node(source, name)
            return self._lose(node, self.in_words(node))
        units = {source: self.values[source] for source in sources}
        after, failure = self._follow(node, units)
        if after is None:
            for source in sources:
                self._pin_node(source, f"{self.in_words(node)}{failure}" if failure else name)
            self._lose(node, f"{self.in_words(node)}{failure}")
            if writes_in_place(node):
                self._written[node] = torch.arange(len(self._maker)), torch.arange(0)
            return
        self.values[node] = after
        if not any(map(self.of_layers, self.units(node))):
            self.lost[node] = self._lost(node)
        if writes_in_place(node):  # other views of the same memory no longer hold what they did
            source = sources[0]
            aside = len(source.users) > 1 or not (
                source in self.trace.calls or op_name(source) == "aten::cat"
            )
            self._written[node] = overwritten(
                units[source],
                after,
                lambda zeros: self._follow(node, {**units, source: zeros})[0],
                aside,
                len(self._maker),
            )

    def _follow(self, node: Node, units: dict[Node, Any]) -> tuple[Any, str]:
        """What the rule of an op makes of units, None where they end; and how the rule fails."""
        rule = rule_for(node)
        if rule is None or not all(isinstance(value, Units) for value in units.values()):
            return None, ""
        try:
            return rule(node, units, self), ""
        except Exception as failure:  # a form of the op that the rule does not know
            return None, f", whose rule fails ({_checks.one_line(failure)})"
