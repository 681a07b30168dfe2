"""Skipping: the closed units of a step are left out of its computation, which stays the same.

A gate that is drawn closed contributes nothing, and gives its weights and its log_alpha exactly
zero gradient from the loss. Where the channels that one layer makes are followed to the layers
that read them, the maker leaves out those that nobody reads in this step, and the readers get the
others compact: no zeros are put in and taken out again between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from l0fast.draw import Compact

OVERHEAD = 5_000_000
"""Multiply-accumulates of one pass that take as long as leaving channels out of a link (on a CPU:
picking weights, putting gradients back)."""
HYSTERESIS = 1.25
"""A link that is computed compactly is left only where that clearly does not pay."""


@dataclass
class Reader:
    """A layer at the end of a link."""

    layer: Any
    labels: Tensor | None
    """[inputs]: the maker's channel at each of its inputs; None where they are the channels."""


@dataclass
class Link:
    """Channels on their way from the layer that makes them to the layers that read them."""

    maker: Any | None
    """None: what arrives is full, and each reader picks what it needs."""
    readers: list[Reader]
    zeros: bool = False
    """Whether a channel that its maker closes arrives as zeros everywhere."""
    compact: bool = False
    """As it was computed last."""

    def layers(self) -> list[Any]:
        """The maker and the readers."""
        return [*(reader.layer for reader in self.readers), *([self.maker] if self.maker else [])]


def _pays(link: Link, kept: int, of: int) -> bool:
    """Whether leaving out the other channels saves more time than it costs."""
    work = sum(layer.weight.numel() * layer._positions for layer in link.layers())
    saved = work * (of - kept) / max(of, 1)
    return saved * (HYSTERESIS if link.compact else 1.0) > OVERHEAD


def _spared(mask: Tensor) -> Tensor:
    """Positions where `mask` is set; the first one where none is (an empty layer does not run)."""
    found = mask.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


class Skipping:
    """The links of a model, and whether closed units are skipped on them.

    Args:
        links: of the model's gated layers; each layer makes, and reads, at most one.
        mode: "auto": a link where it pays; True: every link.
    """

    def __init__(self, links: list[Link], mode: Any) -> None:
        self.links, self.mode = links, mode
        for link in links:
            for layer in link.layers():
                layer._positions = 1

    def assign(self, opened: dict[int, Tensor]) -> None:
        """Tells each layer what it leaves out in this step.

        Args:
            opened: id of a layer drawn in this step -> bool [gates], which of its gates are open.
        """
        rows: dict[int, Tensor] = {}
        cols: dict[int, tuple[Tensor, Tensor | None]] = {}
        for link in self.links:
            if any(id(layer) not in opened for layer in link.layers()):
                continue
            if link.maker is None:
                (reader,) = link.readers
                found = _spared(opened[id(reader.layer)])
                if self._compact(link, len(found), reader.layer.num_gates):
                    cols[id(reader.layer)] = found, found
                continue
            alive = self._alive(link, opened)
            found = _spared(alive)
            if not self._compact(link, len(found), len(alive)):
                continue
            rows[id(link.maker)] = found
            for reader in link.readers:
                alone = len(link.readers) == 1
                cols[id(reader.layer)] = self._columns(reader, alive, found, opened, alone)
        for layer in {id(layer): layer for link in self.links for layer in link.layers()}.values():
            if id(layer) in rows or id(layer) in cols:
                compact = Compact(rows.get(id(layer)), *cols.get(id(layer), (None, None)))
                layer.__dict__["_compact"] = compact

    def _compact(self, link: Link, kept: int, of: int) -> bool:
        link.compact = kept < of and (self.mode is True or _pays(link, kept, of))
        return link.compact

    @staticmethod
    def _alive(link: Link, opened: dict[int, Tensor]) -> Tensor:
        """bool [channels]: those that somebody reads, and that are not zeros."""
        assert link.maker is not None
        alive: Tensor | None = None
        for reader in link.readers:
            if reader.layer.gates != "input":
                alive = None
                break
            needed = opened[id(reader.layer)]
            if reader.labels is not None:
                counts = needed.new_zeros(link.maker.weight.shape[0], dtype=torch.float32)
                needed = counts.index_add_(0, reader.labels, needed.float()) > 0
            alive = needed if alive is None else alive | needed
        if link.zeros and link.maker.gates == "output":
            own = opened[id(link.maker)]
            alive = own if alive is None else alive & own
        if alive is None:
            alive = torch.ones(link.maker.weight.shape[0], dtype=torch.bool)
        return alive

    @staticmethod
    def _columns(
        reader: Reader, alive: Tensor, found: Tensor, opened: dict[int, Tensor], alone: bool
    ) -> tuple[Tensor, Tensor | None]:
        """([C] columns to compute with, their positions among the inputs that arrive)."""
        by_gates = reader.layer.gates == "input"
        if reader.labels is None and (alone or not by_gates):
            return found, None  # what arrives is what it wants
        there = torch.zeros_like(alive)
        there[found] = True
        arrives = there if reader.labels is None else there[reader.labels]
        wanted = arrives & opened[id(reader.layer)] if by_gates else arrives
        positions, arriving = wanted.nonzero().flatten(), arrives.nonzero().flatten()
        if not len(positions):
            positions = arriving[:1]
        if len(positions) == len(arriving):
            return positions, None
        return positions, torch.searchsorted(arriving, positions)
