"""Where gates go in a model, by its structure: what `sparsify_` does with gates="auto".

A gate on a layer's inputs is the safe one: closed, nobody reads the units behind it, so that what
makes them can go, whatever is between. It serves a block of inputs where those can only vanish
together: an attention head, a group of a convolution, a channel that was flattened.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from l0fast.graph.capture import Trace, is_carrier
from l0fast.graph.liveness import Liveness
from l0fast.graph.sites import Site, find_sites, is_held, tied_modules
from l0fast.graph.units import STAYS
from l0fast.graph.walk import Walk
from l0fast.layers.dense_types import is_linear
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.layers.serving import Share

BASE = ".base_layer"
"""How the names of layers end that have an adapter beside them."""


@dataclass(frozen=True)
class Choice:
    """Where one layer's gates go: "input", "output" or "" for none."""

    gates: str
    reason: str = ""
    units: int = 1
    shared: str = ""
    """The layer before, which reads some of the same units, whose gates it shares."""
    share: Share | None = None
    """Which of those gates it has, where it does not have all of them, in order."""


def without_structure(layers: Mapping[str, nn.Module]) -> dict[str, Choice]:
    """Where gates go in a model whose graph is not known: safe anywhere, if not always smaller."""
    return {
        name: Choice("input" if is_linear(layer) else "output") for name, layer in layers.items()
    }


def by_structure(
    model: nn.Module, trace: Trace, layers: Mapping[str, nn.Module]
) -> dict[str, Choice]:
    """Layer -> where its gates go, for every Linear and convolution that is not a gated one.

    Args:
        model: without gates on the layers in question.
        trace: its export.
        layers: those that may have gates.

    - A convolution whose closed channels can vanish one by one, and reach their readers as zeros,
      has gates on its outputs; a Linear that reads them has a gate on each of its inputs.
    - Any other layer has gates on its inputs, if nothing but layers needs the units there; one gate
      for each block of inputs that can only vanish together. Where several layers read the same
      units (a residual stream, a squeeze-and-excite branch) they share the gates. So they do where
      they read some of the same (a skip connection, a dense block) and a convolution is among
      them: each has its own part of one set of gates. Linears alone have gates of their own there.
    - Units that vanish together and lie in blocks of several sizes, or at several places, have one
      gate, which each of these inputs names.
    - A Linear that reads the model's own inputs has a gate on each. It has gates on its outputs if
      a recurrent layer reads them, since that layer has no gates.
    - No gates where nothing would get smaller: on what a residual stream or the output keeps.
    """
    tied = {
        name: f"it shares its weight with {other}" for name, other in tied_modules(model).items()
    }
    sites = find_sites(model, trace, tied, {})
    recipe = _Recipe(trace, sites, layers)
    own = {name: site for name, site in sites.items() if _makes(site.layer) and not is_held(site)}
    return {name: recipe.choose(site) for name, site in own.items()} | {
        name: Choice("", "it passes its channels on: they go with the gates of its neighbours")
        for name, site in sites.items()
        if isinstance(site.layer, nn.modules.conv._ConvNd) and is_carrier(site.layer)
    }


def _makes(layer: nn.Module) -> bool:
    return not is_carrier(layer) and not isinstance(layer, nn.Embedding)


class _Recipe:
    """What is known of a model's units when the layers choose their gates, in the graph's order."""

    def __init__(
        self, trace: Trace, sites: dict[str, Site], layers: Mapping[str, nn.Module]
    ) -> None:
        self.walk = walk = Walk(trace, sites.values())
        self.readers: dict[int, set[str]] = {}
        """Class of units -> the layers that read it."""
        self.makers: dict[int, set[str]] = {}
        """Class of units -> the layers that make it."""
        self.reads: dict[str, set[int]] = {}
        """Layer -> the classes of units that it reads."""
        self.streams: set[int] = set()
        """Classes of units that have gates in the norms of a residual stream."""
        self.carried: set[int] = set()
        """Classes of units that a norm or a convolution in groups passes on."""
        self.vectors: dict[str, Tensor] = {}
        """Layer that may have gates -> the class of each block of inputs; of each input, if they
        do not lie in blocks of one size, or lie in several places."""
        for name, units in walk.inputs.items():
            found = [] if units is None else self._classes(units.labels)
            if is_carrier(sites[name].layer):
                self.carried.update(found)
                if isinstance(sites[name].layer, GatedRMSNorm):
                    self.streams.update(found)
                continue
            self.reads[name] = set(found)
            for one in found:
                self.readers.setdefault(one, set()).add(name)
            if units is not None and name in layers and not sites[name].fixed:
                classes, block = walk.classes[units.labels], len(units.labels) // len(found)
                vector = classes[::block]
                even = torch.equal(classes, vector.repeat_interleave(block))
                self.vectors[name] = vector if even else classes
        for name, labels in walk.made.items():
            for one in self._classes(labels):
                self.makers.setdefault(one, set()).add(name)
        self.stays = int(walk.classes[STAYS])
        self.nonzero = self._nonzero(trace, sites)
        """Classes of units that do not reach every reader as zeros when their maker gives zeros."""
        self.adapted = [name[: -len(BASE)] for name in sites if name.endswith(BASE)]
        """The modules in which a layer has an adapter beside it."""
        self.vanishing: dict[frozenset[str], bool] = {}
        """The layers that read some units -> see `_vanishes`."""
        self.closed_by_maker: set[int] = set()
        """Classes of units that have gates where they are made,"""
        self.closed_by_reader: set[int] = set()
        """and where they are read."""

    def _classes(self, labels: Tensor) -> list[int]:
        return self.walk.classes[labels].unique().tolist()

    def _nonzero(self, trace: Trace, sites: dict[str, Site]) -> set[int]:
        silent = {
            name: dataclasses.replace(site, writes=torch.zeros_like(site.writes))
            for name, site in sites.items()
            if _makes(site.layer)
        }
        held = [name for name, site in sites.items() if is_held(site)]
        walk = Walk(trace, (sites | silent).values(), held)
        found: set[int] = set(self.carried)
        for name, units in walk.inputs.items():
            if units is not None and _makes(sites[name].layer):
                zero = (units.constant == 0) & ~walk.tainted[units.labels]
                found.update(self._classes(units.labels[~zero]))
        return found

    def choose(self, site: Site) -> Choice:
        """Where the gates of a Linear or an ordinary convolution go."""
        if site.fixed:
            return Choice("", site.fixed)
        inputs = self._inputs(site)
        made, units = self.walk.made[site.name], self.walk.inputs[site.name]
        classes = set(self._classes(made))
        if is_linear(site.layer) and not self._before_recurrent(classes):
            return inputs
        if inputs.gates and units is not None and bool((units.labels != STAYS).any()):
            return inputs
        alone = len(classes) == len(made) and all(self.makers[o] == {site.name} for o in classes)
        gated = self.closed_by_reader & classes
        if self.stays in classes or self.nonzero & classes or gated or not alone:
            return inputs
        self.closed_by_maker |= classes
        return Choice("output")

    def _before_recurrent(self, classes: set[int]) -> bool:
        """Whether a recurrent layer, which can have no gates, reads units of some classes."""
        readers = set[str]().union(*(self.readers.get(one, ()) for one in classes))
        return any(is_held(self.walk.sites[name]) for name in readers)

    def _inputs(self, site: Site) -> Choice:
        linear = is_linear(site.layer)
        units, source = self.walk.inputs[site.name], self.walk.sources[site.name]
        if units is None or not bool((units.labels != STAYS).any()):
            if linear and source.startswith("the model's input"):
                if any(site.name.startswith(f"{path}.") for path in self.adapted):
                    return Choice("", "with a gather before it, an adapter could not be merged")
                return Choice("input")
            return Choice("", f"it reads {source}")
        classes = self.walk.classes[units.labels]
        found: set[int] = set(classes.tolist())
        if self.stays in found:
            return Choice("", f"what it reads must stay: {self.walk.reasons(units.labels)}")
        if found & self.streams:
            return Choice("", "what it reads has gates, in the norms")
        if found <= self.closed_by_maker:
            return Choice("input") if linear else Choice("", "what it reads has gates")
        vector = self.vectors.get(site.name)
        if vector is None:
            return Choice("", "it is not one of the layers that may have gates")
        if len(found) == 1:
            why = self.walk.tied_by(units.labels)
            return Choice("", f"what it reads can only vanish as a whole{why and ': '}{why}")
        names = self._connected(site.name)
        barred = [name for name in names if not self._can_share(site, name)]
        alike = not barred and all(torch.equal(self.vectors[name], vector) for name in names)
        once = len(vector) == len(found)
        images = any(not is_linear(self.walk.sites[n].layer) for n in names)
        if not alike and not images:
            names = [site.name]  # where they disagree they gather
        elif barred:  # they would gather whole images
            others = [name for name in barred if self.reads[name] & found] or barred
            return Choice("", f"what it reads is also read by {', '.join(others)}")
        gated = set[int]().union(*(self.reads[name] for name in names))
        if images and not all(map(self._vanishes, gated)):
            by = Liveness(self.walk).divided_by(gated)
            return Choice("", f"no unit that it reads can vanish alone: they are divided by {by}")
        shared = names[0] if names[0] != site.name else ""
        same = "the same" if alike else "some of the same"
        reason = f"the gates of {shared!r}, which reads {same}" if shared else ""
        share = None if alike and once else self._share(names, vector)
        self.closed_by_reader |= gated
        return Choice("input", reason, len(classes) // len(vector), shared, share)

    def _connected(self, name: str) -> list[str]:
        """The layers that read what a layer reads, and those that read what these do, and so on."""
        found, new = set[str](), {name}
        while new:
            found |= new
            classes = set[int]().union(*(self.reads[one] for one in new))
            new = set[str]().union(*(self.readers[one] for one in classes)) - found
        return [name for name in self.walk.sites if name in found]

    def _can_share(self, site: Site, name: str) -> bool:
        """Whether another layer may have gates on what it reads, and share them with this one."""
        vector, found = self.vectors.get(name), self.reads[name]
        weight, theirs = (self._weight(one) for one in (site, self.walk.sites[name]))
        return (
            vector is not None
            and len(found) > 1
            and self.stays not in found
            and not found <= self.closed_by_maker
            and (weight.dtype, weight.device) == (theirs.dtype, theirs.device)
        )

    def _share(self, names: list[str], vector: Tensor) -> Share | None:
        """What a layer that reads `vector` has of the gates on all that some layers read."""
        units = list(dict.fromkeys(torch.cat([self.vectors[name] for name in names]).tolist()))
        place = {one: index for index, one in enumerate(units)}
        index = tuple(place[one] for one in vector.tolist())
        return None if index == tuple(range(len(units))) else Share(index, len(units))

    def _vanishes(self, one: int) -> bool:
        """Whether units of a class exist no more when the gates that all their readers have on them
        are closed; of the classes with the same readers, one is tried."""
        readers = frozenset(self.readers[one])
        if readers not in self.vanishing:
            walk = copy.copy(self.walk)
            walk.sites = dict(walk.sites)
            for name in readers:
                reads = walk.classes[self.walk.inputs[name].labels] != one  # type: ignore[union-attr]
                walk.sites[name] = dataclasses.replace(walk.sites[name], reads=reads)
            self.vanishing[readers] = not bool(Liveness(walk).present()[one])
        return self.vanishing[readers]

    @staticmethod
    def _weight(site: Site) -> Tensor:
        weight = site.layer._parameters["weight"]
        assert weight is not None
        return weight
