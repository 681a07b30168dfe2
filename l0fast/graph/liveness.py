"""Which units of a model somebody reads, and what each of its layers therefore needs.

A unit that every reader ignores (its gate there is closed, or it is constantly zero there) need
not exist, whatever is between; one that reaches an op which cannot be followed must.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.fx import Node

from l0fast.graph.capture import is_carrier
from l0fast.graph.channels import RIGID
from l0fast.graph.nodes import op_name
from l0fast.graph.sites import Site, is_held
from l0fast.graph.units import STAYS, Units, grids_of, narrowed
from l0fast.graph.walk import Walk


@dataclass
class Extent:
    """What one layer physically has: its columns and rows, and what arrives and leaves."""

    arrives: Tensor
    """bool [in]: inputs that are there."""
    columns: Tensor
    """bool [in], within `arrives`: inputs that it computes with."""
    rows: Tensor
    """bool [out]: outputs that it computes."""
    leaves: Tensor
    """bool [out], around `rows`: outputs that are there afterwards, zeros where not computed."""
    source: str = ""
    """Where the inputs come from, if they could not be followed."""
    stops: list[str] = field(default_factory=list)
    """What reads the outputs and cannot be followed, or needs them to be there."""
    constants: Tensor | None = None
    """float64 [in]: the constant of each input that goes into the bias in its stead, or 0."""


def local_extents(sites: Iterable[Site]) -> dict[str, Extent]:
    """Every layer by itself: gather its open inputs, compute, scatter its open outputs."""
    return {site.name: _local(site) for site in sites}


def _local(site: Site) -> Extent:
    arrives, leaves = torch.ones_like(site.reads), torch.ones_like(site.writes)
    columns, rows = (site.reads, site.writes) if site.local else (arrives, leaves)
    return Extent(arrives, columns, rows, leaves)


def last_to_go(walk: Walk, labels: Tensor) -> int:
    """The place of the unit that a layer keeps in any case: of a class that has the fewest units of
    other layers, and then the fewest of its own.

    Args:
        walk: along the graph.
        labels: units of the layer, those that it may keep.
    """
    made = torch.cat([walk.classes[of] for of in walk.made.values()])
    total, own = (of.bincount(minlength=len(walk.classes)) for of in (made, walk.classes[labels]))
    classes = walk.classes[labels]
    others = (total - own)[classes].clamp(min=0)
    return int((others * (int(own.max()) + 1) + own[classes]).argmin())


class Liveness:
    """What is left of a model's units when its gates are closed.

    Args:
        walk: along the graph of the model, without gates.
        training: along its graph in training, where layers run that do not run in evaluation: they
            are no reason for a unit to stay, and lose the inputs that are gone.

    Attributes:
        whole: modules that, where they are rigid, need all that enters and leaves them.
    """

    def __init__(self, walk: Walk, training: Walk | None = None) -> None:
        self.walk, self.training = walk, training
        self.whole: list[str] = []
        self.columns: dict[str, Tensor] = {}
        """Layer -> bool [in]: inputs that it reads and that are not constants which can go."""
        self.constants: dict[str, Tensor] = {}
        """Layer -> float64 [in]: the constants that can go into its bias, else 0."""
        live = torch.zeros(len(walk.classes), dtype=torch.bool)
        live[walk.classes[STAYS]] = True
        for name, units in walk.inputs.items():
            site = walk.sites[name]
            if units is None or is_carrier(site.layer) or site.fixed:
                continue
            zero = (units.constant == 0) & ~walk.tainted[units.labels]
            self.constants[name] = torch.zeros_like(units.constant)
            if site.folds:
                known = ~units.constant.isnan() & ~walk.restless[units.labels] & ~zero
                self.constants[name][known] = units.constant[known]
                zero |= known
            self.columns[name] = site.reads & ~zero
            live[walk.classes[units.labels[self.columns[name]]]] = True
        for name, labels in walk.made.items():
            if not walk.trace.counts[name]:
                live[walk.classes[labels]] = True
        self.kept: list[int] = []
        """Classes of units that are there only since a layer keeps one in any case."""
        # A layer keeps a unit even if its readers and its own gates have none in common.
        for name, labels in walk.made.items():
            may_stay = labels[walk.sites[name].writes]
            if len(may_stay) and not bool(live[walk.classes[may_stay]].any()):
                self.kept.append(int(walk.classes[may_stay[last_to_go(walk, may_stay)]]))
                live[self.kept[-1]] = True
        self.live = live
        """bool, by class of units: somebody reads it."""
        self._known: dict[Node, Tensor] = {}

    def _read(self, node: Node) -> Tensor:
        """The units that a node reads."""
        if node not in self._known:
            of = (self.walk.units(one) for one in node.all_input_nodes or [node])
            found = (narrowed(units.labels).unique() for parts in of for units in parts)
            self._known[node] = torch.cat([torch.tensor([STAYS]), *found])
        return self._known[node]

    def rigid(self, modules: Collection[str] | None) -> list[tuple[Node, Tensor]]:
        """The nodes of some modules (None: of all) that may have sizes written out; their units."""
        trace = self.walk.trace
        whole = [module for module in self.whole if modules is not None and module in modules]
        return [
            (node, self._read(node))
            for node in trace.nodes
            if (self._is_rigid(node) and (modules is None or trace.callers[node] in modules))
            or any(self._at_border(node, module) for module in whole)
        ]

    def _is_rigid(self, node: Node) -> bool:
        trace = self.walk.trace
        if trace.callers[node] in self.walk.sites:  # a layer knows its size
            return False
        return node in trace.filled or (op_name(node) in RIGID and node not in trace.calls)

    def _at_border(self, node: Node, module: str) -> bool:
        """Whether a node reads what enters or leaves a module, or is of its own forward."""
        callers = self.walk.trace.callers

        def inside(one: Node) -> bool:
            return not module or f"{callers[one]}.".startswith(f"{module}.")

        own = callers[node] == module and node.op == "call_function"
        return own or any(inside(source) != inside(node) for source in node.all_input_nodes)

    def left(self, units: Units, present: Tensor, dim: int) -> int:
        """What is left of a tensor's size along one dimension; an empty one has nothing to lose."""
        if not units.labels.numel():
            return units.labels.shape[dim]
        labels = narrowed(units.labels).movedim(dim, 0)
        there = present[self.walk.classes[labels]].reshape(len(labels), -1).any(1)
        return int(there.expand(units.labels.shape[dim]).sum())

    def _uneven(self, node: Node, present: Tensor) -> bool:
        """Whether x.chunk(n) would cut what is left elsewhere than between its parts."""
        number, dim = (*node.args, 0)[1:3]
        left = [self.left(part, present, dim) for part in self.walk.units(node)]  # type: ignore[arg-type]
        return left != [len(part) for part in torch.empty(sum(left)).chunk(number)]  # type: ignore[arg-type]

    def viewed(self, rigid: Collection[str]) -> Tensor:
        """bool, by class of units: some modules view, split or slice it."""
        viewed = torch.zeros_like(self.live)
        for _, labels in self.rigid(rigid):
            viewed[self.walk.classes[labels]] = True
        return viewed

    def present(self, rigid: Collection[str] = ()) -> Tensor:
        """bool, by class of units: it exists, if only as zeros."""
        classes, present = self.walk.classes, self.live | self.viewed(rigid)
        uneven = [node for node in self.walk.values if op_name(node) == "aten::chunk"]
        # What is left of every tensor must be whole slices along each of its dimensions.
        while True:
            before = present.clone()
            for grid in self.walk.grids:
                block = torch.ones_like(grid, dtype=torch.bool)
                for dim in range(grid.dim()):
                    others = [other for other in range(grid.dim()) if other != dim]
                    block &= present[grid].any(others, keepdim=True)
                present[grid[block]] = True
            for node in uneven:
                if self._uneven(node, present):
                    present[classes[self._read(node)]] = True
            if torch.equal(before, present):
                return present

    @cached_property
    def _alone(self) -> Tensor:
        """What is present where no module is rigid."""
        return self.present()

    def shrinking(self) -> list[str]:
        """The modules that view, split or slice tensors which lose units, in the graph's order."""
        present, classes = self._alone, self.walk.classes
        return list(
            dict.fromkeys(
                self.walk.trace.callers[node]
                for node, labels in self.rigid(None)
                if not bool(present[classes[labels]].all())
            )
        )

    def extents(self, rigid: Collection[str] = ()) -> dict[str, Extent]:
        """What each layer physically needs, with gathers and scatters only where they must be.

        Args:
            rigid: modules in whose forward sizes are written out: what they view, split or slice
                must be there, if only as zeros.
        """
        walk, present = self.walk, self.present(rigid)
        written: dict[str, dict[str, Node]] = {}  # layer -> op -> node that is told a size
        for node, labels in self.rigid(rigid):
            for name in walk.makers(labels):
                written.setdefault(name, {}).setdefault(op_name(node), node)
        result = local_extents(walk.sites.values())
        for name, extent in result.items():
            if not walk.trace.counts[name]:
                continue
            units = walk.inputs[name]
            extent.source = walk.sources[name] or (walk.reasons(units.labels) if units else "")
            told = list(written.get(name, {}).values()) or self._sliced(name, present)
            extent.stops = list(map(walk.in_words, told))
            if not told and name in walk.made:
                extent.stops = [walk.reasons(walk.made[name]) or walk.tied_by(walk.made[name])]
            if not walk.sites[name].fixed:
                self._fit(extent, walk.sites[name], present)
        if self.training is not None:
            self._fit_training(self.training, result, present)
        return result

    def divided_by(self, classes: Collection[int]) -> str:
        """The first op that views, splits or slices units of some classes, in words."""
        sought = torch.tensor(sorted(classes))
        found = (
            self.walk.in_words(node)
            for node, labels in self.rigid(None)
            if bool(torch.isin(self.walk.classes[labels], sought).any())
        )
        return next(found, "views of tensors that hold others, too")

    def _sliced(self, name: str, present: Tensor) -> list[Node]:
        """The op that needs units of a layer, which nobody reads, since they lie in a slice with
        others of several layers; if they do."""
        walk = self.walk
        made = walk.classes[walk.made[name]] if name in walk.made else torch.arange(0)
        unread = made[present[made] & ~self.live[made]]
        for node, _ in self.rigid(None) if len(unread) else ():
            grids = grids_of(walk.units(node), walk.classes)
            if any(bool(torch.isin(unread, grid).any()) for grid in grids):
                return [node]
        return []

    def _fit_training(self, training: Walk, result: dict[str, Extent], present: Tensor) -> None:
        """Takes the inputs that are gone from the layers that run in training alone."""
        for name, units in training.inputs.items():
            if self.walk.trace.counts[name] or units is None:
                continue
            extent = result[name]
            extent.arrives = extent.columns = present[self.walk.classes[units.labels]]
            if is_carrier(self.walk.sites[name].layer):
                extent.rows = extent.leaves = present[self.walk.classes[training.outputs[name]]]

    def _fit(self, extent: Extent, site: Site, present: Tensor) -> None:
        """Gives a layer what is left of the units that arrive and leave."""
        units = self.walk.inputs[site.name]
        outputs = self.walk.classes[self.walk.outputs[site.name]]
        extent.leaves = present[outputs]
        arrives = None if units is None else present[self.walk.classes[units.labels]]
        if is_carrier(site.layer):
            extent.rows = extent.leaves
            if is_held(site):
                arrives = extent.leaves
            if arrives is not None:
                extent.arrives = extent.columns = arrives
            if site.local:  # its gates say what its statistic counts
                extent.rows = extent.leaves & site.writes
                extent.columns = extent.arrives & site.writes
            return
        extent.rows = extent.leaves & self.live[outputs] & site.writes
        if arrives is not None:
            # A weight of a recurrent layer cannot have a gather before it.
            columns = arrives if site.bound or is_held(site) else self.columns[site.name].clone()
            extent.arrives, extent.columns = arrives, columns
            if not bool(extent.columns.any()):
                extent.columns[extent.arrives.nonzero()[0]] = True
            gone = site.reads & ~extent.columns
            extent.constants = self.constants[site.name].masked_fill(~gone, 0.0)
