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
    work: int = 0
    """Multiply-accumulates of its layers for the example."""

    def layers(self) -> list[Any]:
        """The maker and the readers."""
        return [*(reader.layer for reader in self.readers), *([self.maker] if self.maker else [])]


def _spared(mask: Tensor) -> Tensor:
    """Positions where `mask` is set; the first one where none is (an empty layer does not run)."""
    found = mask.nonzero().flatten()
    return found if len(found) else found.new_zeros(1)


class Skipping:
    """The links of a model, and whether closed units are skipped on them.

    What is left out depends on the gates and on the size of the input alone, so that a training
    that is resumed takes the very steps of one that was not interrupted.

    Args:
        links: of the model's gated layers; each layer makes, and reads, at most one.
        mode: "auto": a link where it pays; True: every link.
        size: elements of the example's first tensor.
    """

    def __init__(self, links: list[Link], mode: str | bool, size: int = 1) -> None:
        self.links, self.mode, self.size = links, mode, size

    def assign(self, opened: dict[int, Tensor], inputs: tuple[Any, ...]) -> None:
        """Tells each layer what it leaves out in this step.

        Args:
            opened: id of a layer drawn in this step -> bool [gates], which of its gates are open.
            inputs: of the model's forward.
        """
        first = next((value for value in inputs if isinstance(value, Tensor)), None)
        examples = 1.0 if first is None else first.numel() / self.size
        rows: dict[int, Tensor] = {}
        cols: dict[int, tuple[Tensor, Tensor | None]] = {}
        for link in self.links:
            if any(id(layer) not in opened for layer in link.layers()):
                continue
            if link.maker is None:
                (reader,) = link.readers
                found = _spared(opened[id(reader.layer)])
                if self.pays(link, len(found), reader.layer.num_gates, examples):
                    cols[id(reader.layer)] = found, found
                continue
            alive = self._alive(link, opened)
            found = _spared(alive)
            if not self.pays(link, len(found), len(alive), examples):
                continue
            rows[id(link.maker)] = found
            for reader in link.readers:
                alone = len(link.readers) == 1
                cols[id(reader.layer)] = self._columns(reader, alive, found, opened, alone)
        for layer in {id(layer): layer for link in self.links for layer in link.layers()}.values():
            if id(layer) in rows or id(layer) in cols:
                compact = Compact(rows.get(id(layer)), *cols.get(id(layer), (None, None)))
                layer.__dict__["_compact"] = compact

    def pays(self, link: Link, kept: int, of: int, examples: float) -> bool:
        """Whether leaving out the other channels saves more time than it costs."""
        if kept == of or self.mode is True:
            return kept < of
        return link.work * examples * (of - kept) / of > OVERHEAD

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
