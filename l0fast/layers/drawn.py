"""What a model's draw leaves with its layers: their gates, their counts, and what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast.maths.compaction import Order
from l0fast.maths.hard_concrete import HardConcrete


def _spent(node: Any) -> bool:
    """Whether a backward pass has gone through this node of autograd (see `autograd.functions`)."""
    spent = getattr(node, "spent", None)
    if spent is not None:
        return spent
    try:  # a compiled forward's node does not say so; asking it is slow only where it raises
        getattr(node, "_raw_saved_tensors", None)
    except RuntimeError:
        return True
    return False


class Draw:
    """The gates drawn together, and how many of each layer's are expected to be open."""

    __slots__ = ("earlier", "live", "node", "owner", "places", "totals")

    def __init__(self, owner: int, live: bool = True) -> None:
        self.owner = owner  # id of the model whose forward this is
        self.live = live
        self.totals: Tensor | None = None  # expected open gates of each layer
        # id of a layer -> its place in the totals, version of its log_alpha (the layers themselves
        # would be held in a cycle, and their memory with them)
        self.places: dict[int, tuple[int, int]] = {}
        self.node: Any = None  # weak reference to this draw's node of autograd
        self.earlier: list[Any] = []  # the same of draws that still waited for their backward

    def count(self, totals: Tensor, layers: Sequence[list[Any]]) -> None:
        """Keeps the counts for `expected_open`; layers that share their gates have one place."""
        self.totals = totals
        self.places = {
            id(layer): (place, layer.log_alpha._version)
            for place, sharing in enumerate(layers)
            for layer in sharing
        }

    def take(self) -> Tensor | None:
        """The counts, handed out once, or None if they cannot be used any more."""
        totals, self.totals = self.totals, None
        if totals is None or _spent(totals.grad_fn):
            return None
        return totals if totals.requires_grad or not torch.is_grad_enabled() else None

    def place(self, layer: Any) -> int | None:
        """The layer's place in the counts, or None if its log_alpha has changed since."""
        place, version = self.places[id(layer)]
        return place if version == layer.log_alpha._version else None

    def waiting(self) -> list[Any]:
        """References to the nodes, of this draw and earlier, that wait for their backward."""
        nodes = self.earlier if self.node is None else [*self.earlier, self.node]
        found = [(reference, reference()) for reference in nodes]
        return [ref for ref, node in found if node is not None and not _spent(node)]


class Compact(NamedTuple):
    """What a layer computes with in one step; None stands for all."""

    rows: Tensor | None
    """Outputs that it makes."""
    cols: Tensor | None
    """Inputs that it reads."""
    gather: Tensor | None
    """Where those lie in what arrives, if more arrives."""


EVERYTHING = Compact(None, None, None)


class OnDevice(NamedTuple):
    """The same where the host does not know what is open, in the shapes of all units."""

    rows: Order | None
    cols: Order | None


# Not None: torch.compile would compile the first step's forward, and then all others'.
NOT_DRAWN: tuple[Tensor | None, Draw] = (None, Draw(owner=0, live=False))


def in_force(draw: Draw) -> bool:
    """Whether a draw is this call's: in its model's forward, or replayed in a backward.

    Raises:
        RuntimeError: replayed, after a later forward has drawn other gates.
    """
    # Activation checkpointing runs a layer again while the graph is walked backward, when
    # the model's forward is over: the gates it must see are those it saw then.
    if draw.live or torch.compiler.is_compiling():
        return draw.live
    replayed = torch._C._current_graph_task_id() != -1
    if replayed and any(not _spent(ref()) for ref in draw.earlier if ref() is not None):
        raise RuntimeError(
            "activation checkpointing: got several forward passes before a backward; expected "
            "a backward after each (its gates are gone), or noise='example'"
        )
    return replayed


DRAWN = ("_drawn", "_counted", "_compact")
"""What a layer remembers of its draws."""


class Drawn:
    """A layer whose gates are drawn for it, and what it remembers of that."""

    gates: str
    noise: str
    distribution: HardConcrete
    log_alpha: nn.Parameter
    training: bool
    settled: bool = False
    """Whether its gates are decided: training then has those of evaluation, without noise."""
    units: int
    """How many consecutive inputs each gate serves; 1 for gates that are not on inputs."""
    _drawn: tuple[Tensor | None, Draw]
    """The model's draw: this layer's gates [num_gates], and what they are part of."""
    _counted: Draw
    """The draw whose counts are the latest."""
    _compact: Compact | OnDevice | None
    """What the model's draw leaves to compute with, if it leaves something out."""

    def _forget_draws(self) -> None:
        self._drawn, self._counted, self._compact = NOT_DRAWN, NOT_DRAWN[1], None

    def open_probability(self) -> Tensor:
        """P(z > 0) of each gate, of log_alpha's shape, differentiable; 0 or 1 once settled."""
        if self.settled:
            return (self.distribution.median(self.log_alpha) > 0).to(self.log_alpha.dtype)
        return self.distribution.open_probability(self.log_alpha)

    def spread(self, values: Tensor) -> Tensor:
        """What each gate has, [..., num_gates], for each of the units that it serves."""
        return values if self.units == 1 else values.repeat_interleave(self.units, -1)

    def _count_alone(self, total: Tensor) -> None:
        self._counted = Draw(owner=0, live=False)
        self._counted.count(total, [[self]])

    def _drawn_here(self) -> bool:
        """Whether the model's draw is this call's: in its forward, or replayed in a backward."""
        z, draw = self._drawn
        if z is None:
            return False
        return in_force(draw)

    def _compact_here(self) -> Compact | OnDevice | None:
        """What this call leaves out: a model's draw, which says so, holds in its forward alone."""
        compact = self._compact
        return compact if compact is not None and self.training and self._drawn_here() else None

    def __getstate__(self) -> dict[str, Any]:
        # A draw belongs to one step of one model: copies and pickles start without.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return {**state, "_drawn": NOT_DRAWN, "_counted": NOT_DRAWN[1], "_compact": None}
