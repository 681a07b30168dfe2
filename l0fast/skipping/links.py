"""From one export of a model: the links along which closed units can be skipped."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.capture import NORMS, Trace
from l0fast.graph.channels import RIGID
from l0fast.graph.nodes import op_name, shape_of
from l0fast.graph.sites import find_sites
from l0fast.graph.units import STAYS
from l0fast.graph.walk import Walk
from l0fast.layers.dense_types import inputs_first
from l0fast.layers.draw import Drawn
from l0fast.layers.handle import gated_layers
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.skipping.following import can_follow, passes_on
from l0fast.skipping.link import End, Link


def _usable(layer: Any) -> bool:
    """Whether a layer can compute with some of its rows and columns; one whose weight has
    its inputs first, and an RMS norm, are always computed whole."""
    if not isinstance(layer, Drawn) or isinstance(layer, GatedRMSNorm):
        return False
    if layer.noise == "example" or layer.gates == "weight":
        return False
    plain = getattr(layer, "groups", 1) == 1 and not inputs_first(layer)
    return plain and layer.gate_index is None


class _Finder:
    """The links of a model, from a walk along its graph.

    Args:
        model: with gates.
        trace: its export.
        views: follow units across ops that may have sizes written out.
    """

    def __init__(self, model: nn.Module, trace: Trace, views: bool) -> None:
        layers, modules = gated_layers(model), dict(model.named_modules())
        # Weights are read where they are: ties, and who else reads them, do not matter here.
        found = find_sites(model, None, {}, {})
        sites = {
            # A maker of zeros: then it shows where those arrive.
            name: dataclasses.replace(site, writes=torch.zeros_like(site.writes))
            if name in layers and layers[name].gates == "output" and _usable(layers[name])
            else site
            for name, site in found.items()
        }
        self.layers: dict[str, Any] = {}
        """The layers that can leave something out: gated, or those that follow them."""
        for name, site in sites.items():
            layer = layers.get(name, modules[name])
            usable = _usable(layer) if name in layers else can_follow(layer)
            if usable and not site.fixed and trace.counts[name] == 1:
                self.layers[name] = layer
        self.trace, self.walk = trace, Walk(trace, sites.values())
        self.needed = self._needed(views)

    def _needed(self, views: bool) -> Tensor:
        """bool, by class of units: whether they must be there, or cannot be left out."""
        walk = self.walk
        needed = torch.zeros(len(walk.classes), dtype=torch.bool)
        needed[walk.classes[STAYS]] = True
        others = [labels for name, labels in walk.made.items() if name not in self.layers]
        for name, units in walk.inputs.items():
            if name not in self.layers and units is not None:
                others.append(units.labels)
        several = walk.classes.bincount(minlength=len(walk.classes))[walk.classes] > 1
        for node in self.trace.nodes:
            if op_name(node) in RIGID:
                for source in node.all_input_nodes:
                    found = [units.labels.flatten().unique() for units in walk.units(source)]
                    # A width that is written out mostly is that of a single tensor: a stream does
                    # not try.
                    others += [labels[several[labels]] if views else labels for labels in found]
        for labels in others:
            needed[walk.classes[labels]] = True
        return needed

    def _work(self, name: str) -> int:
        """Multiply-accumulates of a layer for the example."""
        weight = self.layers[name].weight
        if type(self.layers[name]) in NORMS:
            return 0
        nodes = (node for node, called in self.trace.calls.items() if called == name)
        places = (math.prod(shape_of(node) or (0,)) for node in nodes)
        return weight.numel() * sum(places) // max(weight.shape[0], 1)

    def _groups(self, vectors: list[Tensor]) -> Tensor:
        """Class of units -> the least class among all those that layers make or read with it."""
        group = torch.arange(len(self.walk.classes))
        while True:
            before = group.clone()
            for vector in vectors:
                group[vector] = group[vector].min()
            group = group[group]
            if torch.equal(before, group):
                return group

    def links(self) -> list[Link]:
        walk, layers = self.walk, self.layers
        made = {name: walk.classes[walk.made[name]] for name in layers if name in walk.made}
        read = {
            name: walk.classes[units.labels]
            for name in layers
            if (units := walk.inputs.get(name)) is not None
        }
        group = self._groups([*made.values(), *read.values()])
        kept = set(group[self.needed].tolist())
        makers: dict[int, list[str]] = {}
        readers: dict[int, list[str]] = {}
        for vectors, found in ((made, makers), (read, readers)):
            for name, vector in vectors.items():
                found.setdefault(int(group[vector[0]]), []).append(name)
        links: list[Link] = []
        linked: set[str] = set()
        for key, names in makers.items():
            if key in kept or all(passes_on(layers[n]) for n in readers.get(key, [])):
                continue
            link = self._link({n: made[n] for n in names}, {n: read[n] for n in readers[key]})
            reads_all = not all(end.by_gates or end.passes_on for end in link.readers)
            if link.channels > 1 and (link.own or not reads_all):
                links.append(link)
                linked.update(readers[key])
        for name, layer in layers.items():
            end = End(layer, None)
            if name not in linked and end.by_gates and name in walk.inputs:
                links.append(Link([], [end], work=self._work(name)))
        return links

    def _link(self, makers: dict[str, Tensor], readers: dict[str, Tensor]) -> Link:
        """The link of some layers, given the classes of units that they make and read."""
        walk, layers = self.walk, self.layers
        channels = torch.tensor(list(dict.fromkeys(torch.cat([*makers.values()]).tolist())))
        place = torch.full((len(walk.classes),), -1)
        place[channels] = torch.arange(len(channels))

        def end(name: str, vector: Tensor) -> End:
            whole = torch.equal(vector, channels)
            return End(layers[name], None if whole else place[vector])

        inputs = [units for name in readers if (units := walk.inputs[name]) is not None]
        # What a norm (or a bias on the way) makes of zeros changes with its parameters.
        zeros = (
            len(makers) == 1
            and not any(passes_on(layers[name]) for name in readers)
            and not any(bool(walk.tainted[walk.made[name]].any()) for name in makers)
            and all(bool((units.constant == 0).all()) for units in inputs)
        )
        macs = sum(self._work(name) for name in (*makers, *readers))
        ends = [end(*item) for item in makers.items()]
        return Link(ends, [end(*item) for item in readers.items()], len(channels), zeros, macs)


def find_links(model: nn.Module, trace: Trace, views: bool = True) -> list[Link]:
    """The links between a model's gated layers.

    Args:
        model: with gates; it is not changed.
        trace: its export.
        views: follow units across ops that may have sizes written out.
    """
    return _Finder(model, trace, views).links()
