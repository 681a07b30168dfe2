"""A link: channels on their way from the layers that make them to those that read them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.layers.draw import Drawn
from l0fast.skipping.following import passes_on


def width_of(needed: int, size: int, multiple: int, before: int = 0) -> int:
    """How many of `size` units are computed where `needed` are: a multiple, or all.

    At least one: an empty layer does not run. `before` is the width of the step before: it stays
    until more than a multiple and a half is idle, so that units which come and go at an edge do
    not change it: each new width is a slow step.
    """
    wanted = min(-(-max(needed, 1) // multiple) * multiple, size)
    idle = before - needed
    return before if wanted < before <= size and 2 * idle <= 3 * multiple else wanted


def rounded_up(mask: Tensor, multiple: int, before: int = 0) -> Tensor:
    """Positions where `mask` is set, and as many others as make their number `width_of` them."""
    found = mask.nonzero().flatten()
    wanted = width_of(len(found), len(mask), multiple, before)
    if len(found) < wanted:
        others = (~mask).nonzero().flatten()[: wanted - len(found)]
        found = torch.cat([found, others]).sort().values
    return found


@dataclass
class End:
    """A layer at an end of a link: one that makes channels or reads them, or is on the way."""

    layer: Any
    labels: Tensor | None
    """The link's channel at each of its outputs (a maker's) or inputs; None where they are just
    the channels."""

    @property
    def by_gates(self) -> bool:
        """Whether it does not read all that arrives."""
        return isinstance(self.layer, Drawn) and self.layer.gates == "input"

    @property
    def passes_on(self) -> bool:
        """Whether it only passes on what arrives, channel by channel."""
        return passes_on(self.layer)

    @property
    def by_outputs(self) -> bool:
        """Whether its own gates are on what it makes."""
        return isinstance(self.layer, Drawn) and self.layer.gates == "output"

    def made(self, there: Tensor | None, found: Tensor) -> Tensor:
        """[C] the outputs that a maker makes; the arguments are those of `columns`."""
        if self.labels is None:
            return found
        assert there is not None
        return there[self.labels].nonzero().flatten()

    def columns(
        self, there: Tensor | None, found: Tensor, opened: Mapping[int, Tensor], alike: bool
    ) -> tuple[Tensor, Tensor | None]:
        """([C] columns to compute with, their positions among the inputs that arrive).

        Args:
            there: bool [channels], which of them are computed, and `found`, their positions; None
                where nobody asks (see `Link.whole`).
            opened: as in `Link.alive`.
            alike: whether all that read the link have the same gates.
        """
        if self.labels is None and (alike or not self.by_gates):
            return found, None  # what arrives is what it wants
        assert there is not None
        arrives = there if self.labels is None else there[self.labels]
        wanted = arrives & opened[id(self.layer)] if self.by_gates else arrives
        positions, arriving = wanted.nonzero().flatten(), arrives.nonzero().flatten()
        if not len(positions):
            positions = arriving[:1]
        if len(positions) == len(arriving):
            return positions, None
        return positions, torch.searchsorted(arriving, positions)


@dataclass
class Link:
    """Channels on their way from the layers that make them to the layers that read them.

    Several layers make the channels of a residual stream, which are added, and those of parallel
    branches, which lie one behind the other.
    """

    makers: list[End]
    """If there are none, what arrives is full, and each reader picks what it needs."""
    readers: list[End]
    channels: int = 0
    zeros: bool = False
    """Whether a channel that its only maker closes arrives as zeros everywhere."""
    work: int = 0
    """Multiply-accumulates of its layers for the example."""

    def layers(self) -> list[Any]:
        """The makers and the readers."""
        return [end.layer for end in (*self.readers, *self.makers)]

    @functools.cached_property
    def weights(self) -> int:
        """Of its layers, with every unit."""
        layers = (layer for layer in self.layers() if not passes_on(layer))
        return sum(layer.weight.numel() for layer in layers)

    @property
    def convolved(self) -> bool:
        """Whether some of its layers are no Linears."""
        return any(not isinstance(layer, nn.Linear) for layer in self.layers())

    @functools.cached_property
    def whole(self) -> bool:
        """Whether each of its ends has just its channels, in their order."""
        return all(end.labels is None for end in (*self.makers, *self.readers))

    @property
    def linear(self) -> bool:
        """Whether kernels can follow it: from a linear layer to others that have gates for it."""
        return (
            len(self.makers) == 1
            and isinstance(self.makers[0].layer, nn.Linear)
            and not self.makers[0].by_outputs
            and all(
                isinstance(reader.layer, nn.Linear) and reader.by_gates and reader.labels is None
                for reader in self.readers
            )
        )

    @property
    def own(self) -> bool:
        """Whether a channel is left out when its maker closes it."""
        return self.zeros and self.makers[0].by_outputs

    def alive(self, opened: Mapping[int, Tensor]) -> Tensor:
        """bool [channels]: those that somebody reads, and that are not zeros.

        Args:
            opened: id of a layer -> bool, which units its gates leave open.
        """
        if not self.makers:
            return opened[id(self.readers[0].layer)]
        size, needed = self.channels, dict[tuple[int, int], Tensor]()
        for reader in self.readers:
            if reader.by_gates:
                need = opened[id(reader.layer)]
                key = id(need), id(reader.labels)  # those that share their gates need the same
                if reader.labels is not None and key not in needed:
                    counts = torch.zeros(size, dtype=torch.float32, device=need.device)
                    need = counts.index_add_(0, reader.labels.to(need.device), need.float()) > 0
                needed.setdefault(key, need)
            elif not reader.passes_on:
                device = next(iter(opened.values())).device
                needed = {(0, 0): torch.ones(size, dtype=torch.bool, device=device)}
                break
        alive = functools.reduce(torch.logical_or, needed.values())
        if self.own:
            alive = alive & opened[id(self.makers[0].layer)]
        return alive

    def computed(
        self, alive: Tensor, multiple: int, widths: dict[int, int] | None = None
    ) -> Tensor:
        """[C] the channels to compute: those alive, and as many more as each maker rounds up.

        Args:
            alive: bool [channels].
            multiple: of the makers' widths.
            widths: place of a maker -> its width in the step before; becomes that of this one.
        """
        widths = {} if widths is None else widths
        if all(maker.labels is None for maker in self.makers):
            found = rounded_up(alive, multiple, widths.get(0, 0))
            widths[0] = len(found)
            return found
        there = alive.clone()
        for place, maker in enumerate(self.makers):
            labels = slice(None) if maker.labels is None else maker.labels
            made = rounded_up(there[labels], multiple, widths.get(place, 0))
            widths[place] = len(made)
            there[made if maker.labels is None else maker.labels[made]] = True
        return there.nonzero().flatten()
