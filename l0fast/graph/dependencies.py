"""Which gates each unit of a model depends on, whichever of them are open."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from l0fast.graph.branches import Branch, branch_of
from l0fast.graph.capture import is_carrier, layer_size
from l0fast.graph.liveness import Liveness, last_to_go
from l0fast.graph.routed import Routed
from l0fast.graph.sites import Site
from l0fast.graph.units import STAYS
from l0fast.graph.walk import Walk
from l0fast.graph.ways import Ways, smallest
from l0fast.layers.branch import BranchGate
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gate_owners, own_gates

Walks = tuple[Walk, Walk]
"""A walk on which nothing is known of the constants that carriers give: what they are now is no
fact of structure. And, where constants go into biases, one on which they are: what a carrier makes
of closed channels is constant, whatever the constant is."""


def _again(walks: Walks, writes: Mapping[str, Tensor]) -> Walks:
    """The walks where some layers have other outputs open (bool [out], by layer)."""
    untold, told = walks
    first = untold.again(writes)
    return first, first if told is untold else told.again(writes)


class GateDependencies:
    """Which gates each input and output of a model's layers depends on.

    Args:
        layers: those whose gates are not on single weights.
        sites: of the model.
        scaled: layers whose gates are a factor on their units.
        live: what the units' readers need; None if each layer is planned by itself.
        rigid, by_token: see `Liveness.extents` and `Routed`.
    """

    def __init__(
        self,
        layers: Mapping[str, Gated],
        sites: Mapping[str, Site],
        scaled: Collection[str],
        live: Liveness | None,
        rigid: Collection[str],
        by_token: bool = False,
    ) -> None:
        owners = gate_owners(layers)
        self.always = sum(layers[name].log_alpha.numel() for name in own_gates(layers))
        """Number of a gate that is always open, and"""
        self.never = self.always + 1
        """of one that never is."""
        self.reads: dict[str, Tensor] = {}
        """Layer -> [in] its own gates."""
        self.writes: dict[str, Tensor] = {}
        """Layer -> [out] its own gates."""
        self.carriers = {name for name, site in sites.items() if is_carrier(site.layer)}
        for name, site in sites.items():
            sides = (torch.full((units,), self.always) for units in layer_size(site.layer))
            self.reads[name], self.writes[name] = sides
        self.branches: list[tuple[int, Branch]] = []
        """The gates on branches, and what they are on."""
        self.experts = Routed(sites, by_token)
        start = 0
        gates: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if owners[name] == name:
                gates[name] = torch.arange(start, start + layer.log_alpha.numel())
                start += layer.log_alpha.numel()
            own = gates[owners[name]]
            if isinstance(layer, BranchGate):
                self.branches.append((int(own), branch_of(name, layer)))
            self.experts.add(name, layer, own)
            if name in sites and name not in scaled:
                sides = self.reads if layer.gates == "input" else self.writes
                sides[name] = layer.spread(own)
        self.columns = {
            name: Ways(
                own.new_full((len(own), 1), self.always) if name in self.carriers else own[:, None],
                torch.full_like(own, self.always)[:, None],
            )
            for name, own in self.reads.items()
        }
        """Layer -> the ways to the inputs that it computes with."""
        self._depth = max((len(self.around(name)) for name in sites), default=0)
        self.classes = {name: torch.full_like(own, STAYS) for name, own in self.writes.items()}
        """Layer -> the class of each output; STAYS where it does not depend on who reads it."""
        self._last: dict[str, int] = {}
        """Layer -> how many of its outputs are in the class that it keeps in any case."""
        self.viewed = torch.ones(1, dtype=torch.bool)
        """bool, by class: its units are there, if only as zeros, whoever reads them."""
        self._readers = torch.zeros(0, 3).long()
        """[R, 1 + A + B] class, and the way to an input that reads units of it."""
        if live is not None:
            self.viewed = live.viewed(rigid)
            self._follow(live.walk)

    def around(self, name: str) -> list[int]:
        """The gates of the branches and experts that a module is in."""
        return [g for g, one in self.branches if one.holds(name)] + self.experts.around(name)

    def gates_around(self, name: str) -> Tensor:
        """[D] the same, filled up with `always`: a layer is there while they are open."""
        found = self.around(name)
        return torch.tensor(found + [self.always] * (self._depth - len(found)), dtype=torch.int64)

    # --- what makes inputs zero ---------------------------------------------------------------

    def _follow(self, walk: Walk) -> None:
        followed = [
            name for name, site in walk.sites.items() if not site.fixed and walk.trace.counts[name]
        ]
        several = torch.zeros_like(walk.classes)
        """Gates on outputs, by class."""
        only = torch.full_like(walk.classes, self.always)
        """The gate found last, by class."""
        gated: list[str] = []
        for name in followed:
            self.classes[name] = walk.classes[walk.outputs[name]]
            last = self.classes[name][last_to_go(walk, walk.outputs[name])]
            self._last[name] = int((self.classes[name] == last).sum())
            own = self.writes[name] < self.always
            if bool(own.any()):
                gated.append(name)
                classes, gates = self.classes[name][own], self.writes[name][own]
                other = only[classes] != gates  # norms of one stream have the same
                several += classes[other].bincount(minlength=len(several))
                only[classes] = gates
        # Where a class of units has several, what each of them does is found apart.
        shared = [n for n in gated if bool((several[self.classes[n]] > 1).any())]
        own = {name: self.writes[name] < self.always for name in gated}
        opened = self._opened(walk)
        shut = _again(opened, {name: ~gates for name, gates in own.items()})
        zeros = self._zeros(shut)
        alone, others = (
            {name: self._zeros(_again(walks, {name: mask(own[name])})) for name in shared}
            for walks, mask in ((opened, torch.logical_not), (shut, torch.ones_like))
        )
        by_class = torch.full_like(walk.classes, self.always)
        """The only gate of a class's units, of those that are not found apart."""
        for name in (name for name in gated if name not in shared):
            by_class[self.classes[name][own[name]]] = self.writes[name][own[name]]
        gates = {name: self._gates(walk, opened, name) for name in shared}
        readers = [name for name in followed if name in zeros]
        for name in readers:
            zero, classes = zeros[name], self._arrives(walk, name)
            single = zero & (several[classes] == 1)
            all_of = [self.reads[name], by_class[classes].masked_fill(~single, self.always)]
            all_of += self.gates_around(name)[:, None].expand(-1, len(classes)).unbind()
            any_of = [torch.full_like(classes, self.never)]
            for maker in shared:
                needed, helps = single | alone[maker][name], zero & ~others[maker][name]
                gate = gates[maker][name]
                all_of.append(gate.masked_fill(~needed, self.always))
                any_of.append(gate.masked_fill(~helps, self.never))
            self.columns[name] = Ways(torch.stack(all_of, 1), torch.stack(any_of, 1))
        self._narrow()
        rows = (
            torch.cat([self._arrives(walk, name)[:, None], *self.columns[name]], 1)
            for name in readers
        )
        width = sum(part.shape[1] for part in next(iter(self.columns.values())))
        self._readers = torch.cat([torch.zeros(0, 1 + width).long(), *rows]).unique(dim=0)

    @staticmethod
    def _arrives(walk: Walk, name: str) -> Tensor:
        """[in] the classes of the units that a layer reads."""
        units = walk.inputs[name]
        assert units is not None
        return walk.classes[units.labels]

    def _gates(self, walk: Walk, opened: Walks, maker: str) -> dict[str, Tensor]:
        """Layer -> [in] the maker's gate that may make each input zero, or `always`."""
        own, classes = self.writes[maker], self.classes[maker]
        if len(classes.unique()) == len(classes):
            by_class = torch.full_like(walk.classes, self.always)
            by_class[classes] = own
            return {name: by_class[self._arrives(walk, name)] for name in self._read(walk)}
        # With several in a class, a gate's place is read bit by bit, from what closing half does.
        found = {name: torch.zeros_like(self.reads[name]) for name in self._read(walk)}
        place = torch.arange(1, len(own) + 1)
        for bit in range(len(own).bit_length()):
            half = (own < self.always) & (place >> bit & 1 == 1)
            for name, zero in self._zeros(_again(opened, {maker: ~half})).items():
                found[name] += zero.long() << bit
        gates = torch.cat([own.new_tensor([self.always]), own])
        return {name: gates[number.clamp(max=len(own))] for name, number in found.items()}

    def _read(self, walk: Walk) -> list[str]:
        """Layers whose inputs are followed to where they are made."""
        return [
            name
            for name, units in walk.inputs.items()
            if units is not None and name not in self.carriers and not walk.sites[name].fixed
        ]

    def _opened(self, walk: Walk) -> Walks:
        told = walk.again({name: torch.ones_like(s.writes) for name, s in walk.sites.items()})
        folds = any(site.folds for site in walk.sites.values())
        untold = told.again({}, self.carriers)
        return untold, told if folds else untold

    def _zeros(self, walks: Walks) -> dict[str, Tensor]:
        """Layer -> bool [in]: inputs that are zero, or constants that go into the bias."""
        closed, told = walks
        zeros: dict[str, Tensor] = {}
        for name in self._read(closed):
            units, known = closed.inputs[name], told.inputs[name]
            assert units is not None
            assert known is not None
            zeros[name] = (units.constant == 0) & ~closed.tainted[units.labels]
            if closed.sites[name].folds:
                zeros[name] |= ~known.constant.isnan() & ~told.restless[known.labels]
        return zeros

    def _narrow(self) -> None:
        """Makes all ways as wide as the widest must be."""
        widths = [1, 1]
        for name, (all_of, any_of) in self.columns.items():
            sides = all_of.sort(1).values, any_of.sort(1).values  # gates before the other numbers
            sides[1][(sides[1] == self.never).all(1), 0] = self.always
            self.columns[name] = Ways(*sides)
            for side, part in enumerate(sides):
                used = int((part < self.always).sum(1).max())
                widths[side] = max(widths[side], used)
        for name, sides in self.columns.items():
            padded = [
                torch.cat([part, part.new_full((len(part), width), filler)], 1)[:, :width]
                for part, width, filler in zip(
                    sides, widths, (self.always, self.never), strict=True
                )
            ]
            self.columns[name] = Ways(*padded)

    # --- what the sizes need ------------------------------------------------------------------

    def inputs(self, names: list[str]) -> Ways:
        """[inputs, ...] the ways to those of some layers, one layer after another, in the
        branches that these are in."""
        columns = [
            self.columns[name].within(self.gates_around(name), self.always) for name in names
        ]
        return Ways(*(torch.cat(parts) for parts in zip(*columns, strict=True)))

    def outputs(self, names: list[str], others: list[tuple[str, Tensor]]) -> tuple[Tensor, Ways]:
        """Of the outputs of some layers, and behind them of `others`, the units by class that some
        modules give: [outputs] their own gates, and [outputs, K, ...] the ways to the inputs that
        read each, once its own gate is open, and the branches that it is in. It is there while one
        way is open.
        """
        own: list[Tensor] = []
        stays: list[Tensor] = []
        for name in names:
            classes = self.classes[name]
            stays.append(classes == STAYS)
            own.append(self.experts.routers.get(name, (self.writes[name],))[0])
            if name in self.carriers:  # they pass on what is there
                stays[-1] = stays[-1] | self.viewed[classes]
                own[-1] = torch.full_like(classes, self.always)
        for _, classes in others:
            stays.append((classes == STAYS) | self.viewed[classes])
            own.append(torch.full_like(classes, self.always))
        gate, stay = torch.cat(own), torch.cat(stays)
        asked = torch.cat([*(self.classes[name] for name in names), *(one for _, one in others)])
        modules = [*names, *(name for name, _ in others)]
        pairs = zip(modules, own, strict=True)
        around = [self.gates_around(name).expand(len(part), -1) for name, part in pairs]
        # Behind all ways that lead to readers: one that is always open, and one that never is.
        width = self._readers.shape[1] - 1
        ends = (torch.full((1, width), number) for number in (self.always, self.never))
        table = torch.cat([self._readers[:, 1:], *ends])
        classes = self._readers[:, 0].contiguous()
        first = torch.searchsorted(classes, asked)
        number = torch.searchsorted(classes, asked, right=True) - first
        first[stay], number[stay] = len(classes), 1
        place = torch.arange(max(1, int(number.max())))
        index = (first[:, None] + place).masked_fill(place >= number[:, None], len(classes) + 1)
        widths = [part.shape[1] for part in self.columns[names[0]]]
        ways = Ways(*table[index].split(widths, -1))
        ways = ways.within(torch.cat(around), self.always)
        return gate, ways.once_open(gate[:, None, None], self.always)

    def least_read(self, name: str) -> int:
        """How many inputs a layer keeps in any case: one, or those of one of its gates."""
        own = self.reads[name]
        return smallest(own) if bool((own < self.always).any()) else 1

    def least(self, name: str) -> int:
        """How many outputs a layer keeps in any case: one, with those that only go with it."""
        if name in self.experts.routers:
            return self.experts.routers[name][1]
        own = bool((self.writes[name] < self.always).any())
        return 1 if own else self._last.get(name) or smallest(self.classes[name])
