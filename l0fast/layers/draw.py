"""What one forward of a model has drawn: gates, expected counts, and what is left out.

The handle of a model (see `handle`) keeps one `Board`. Each gated layer knows its places on the
boards of the models that it belongs to; a board holds no layer, so that a model is freed without
the garbage collector.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from l0fast import functional
from l0fast.layers.serving import Serving
from l0fast.layers.stages import DRAWN, OPEN, QUIET, SETTLED, STAGES, quieter
from l0fast.maths.compaction import Order
from l0fast.maths.hard_concrete import HardConcrete


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


class OpenCounts:
    """How many gates of each of some layers one draw expects to be open."""

    __slots__ = ("totals",)

    def __init__(self, totals: Tensor) -> None:
        self.totals: Tensor | None = totals

    def take(self) -> Tensor | None:
        """The counts, handed out once, or None if they cannot be used any more; without autograd
        their values, which are there as often as one asks."""
        if not torch.is_grad_enabled():
            return None if self.totals is None else self.totals.detach()
        totals, self.totals = self.totals, None
        if totals is None or _spent(totals.grad_fn):
            return None
        return totals if totals.requires_grad else None


class Counted(NamedTuple):
    """The latest count of one layer's open gates."""

    counts: OpenCounts
    index: int
    """Its place in the counts."""
    of: tuple[int, int]
    """Id and version of the log_alpha that was counted."""

    def holds(self, log_alpha: Tensor) -> bool:
        """Whether a layer still has that log_alpha, unchanged."""
        return self.of == (id(log_alpha), log_alpha._version)


class Draw:
    """The gates that one forward of a model uses."""

    __slots__ = ("compacts", "earlier", "live", "nodes", "parts", "unrecorded", "z")

    def __init__(self, places: int, live: bool, earlier: list[Any]) -> None:
        self.live = live
        """Whether that forward is still running."""
        self.unrecorded = False
        """Whether a layer has had its gates while autograd was off."""
        self.z: list[Tensor | None] = [None] * places
        """By place: the gates [num_gates] of a layer, if this draw has any for it."""
        self.parts: list[tuple[Tensor, tuple[int, ...], list[list[Any]]]] = []
        """Gates drawn by one op, their number by log_alpha, and the layers that share each; only
        as long as the forward starts."""
        self.compacts: dict[int, Compact | OnDevice] = {}
        """Id of a layer -> what it leaves out."""
        self.nodes: list[Any] = []
        """Weak references to the autograd nodes of the counts."""
        self.earlier = earlier
        """The same of draws before, which waited for their backward."""

    def see_grad_mode(self) -> None:
        """Notes a forward without autograd, and refuses to replay it with autograd.

        Raises:
            RuntimeError: reentrant activation checkpointing, which would walk the draw's graph once
                for each segment.
        """
        if self.live:
            self.unrecorded |= not torch.is_grad_enabled()
        elif self.unrecorded and torch.is_grad_enabled():
            raise RuntimeError(
                "activation checkpointing: got use_reentrant=True; expected use_reentrant=False "
                "(all segments share the gates of one draw)"
            )

    def waiting(self) -> list[Any]:
        """References to the nodes, of this draw and earlier, that wait for their backward."""
        found = [(reference, reference()) for reference in (*self.earlier, *self.nodes)]
        return [ref for ref, node in found if node is not None and not _spent(node)]


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
            "a backward after each (the first forward's gates are gone), or noise='example'"
        )
    return replayed


class Board:
    """Where the layers of a model find its draw, and leave counts of draws of their own."""

    __slots__ = ("counted", "latest")

    def __init__(self, places: int) -> None:
        self.latest = Draw(places, False, [])
        self.counted: list[Counted | None] = [None] * places
        """By place: the latest count of a layer."""


def several_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_open(log_alpha: Tensor) -> Tensor:
    """Gates of 1, of log_alpha's shape.

    Of several processes, log_alpha gets a gradient of 0: DistributedDataParallel waits for one of
    every parameter.
    """
    ones = torch.ones_like(log_alpha)
    if not (log_alpha.requires_grad and torch.is_grad_enabled() and several_processes()):
        return ones
    return ones + 0 * log_alpha


class Drawn(Serving):
    """A layer whose gates are drawn for it, and where it finds them."""

    gates: str
    noise: str
    distribution: HardConcrete
    training: bool
    stage: str = DRAWN
    """Whether training draws its gates, with all their noise or quietly, with QUIET_NOISE of it; or
    has those of evaluation, without noise: all of them open, as at the start of a training under a
    constraint, or settled, as at its end."""
    told_apart: ClassVar[bool] = True
    """Whether the start sets its gates by magnitudes. Gates that start alike need all of the noise
    to be told apart: they are never quiet."""
    _quiet: HardConcrete | None = None
    """What its quiet gates are drawn from."""
    beside: frozenset[str] | None = None
    """What an adapter had beside it when it got its gates, see `handle.note_adapters`."""
    _places: tuple[tuple[Board, int], ...] = ()
    """The boards of the models that it belongs to, and its place on each."""

    def open_probability(self) -> Tensor:
        """P(z > 0) of each gate in log_alpha under all of the noise, differentiable; 0 or 1 without
        noise."""
        if self.is_drawn:
            return self.distribution.open_probability(self.log_alpha)
        return (self.evaluation_gates() > 0).to(self.log_alpha.dtype)

    @property
    def settled(self) -> bool:
        """Whether its gates are decided."""
        return self.stage == SETTLED

    @property
    def is_drawn(self) -> bool:
        """Whether its gates have noise in training."""
        return self.stage in (DRAWN, QUIET)

    @property
    def drawn_from(self) -> HardConcrete:
        """The distribution that training draws its gates from."""
        return self._quiet or self.distribution

    def set_stage(self, stage: str) -> None:
        """Says what its gates are (see `stage`); what was drawn for them does not hold any more."""
        self.stage = stage
        quiet = stage == QUIET and self.told_apart
        self._quiet = quieter(self.distribution) if quiet else None
        self._forget_draws()

    def evaluation_gates(self) -> Tensor:
        """z in evaluation, of log_alpha's shape: the median of each gate."""
        if self.stage == OPEN:  # but for what a pruning closes
            return all_open(self.log_alpha).masked_fill(self.log_alpha == -torch.inf, 0.0)
        return self.distribution.median(self.log_alpha)

    def _drawn(self) -> Tensor:
        """z for this whole call, of log_alpha's shape: of the model's draw, or of its own."""
        z = self._given() if self.training else None
        if z is not None:
            return z
        if not self.is_drawn or not self.training:
            return self.evaluation_gates()
        gates = functional.hard_concrete(self.log_alpha, distribution=self.drawn_from)
        self._count(OpenCounts(gates.expected_open))
        return gates.z

    def get_extra_state(self) -> Tensor:
        """The stage of its gates, which a state has beside the parameters."""
        return torch.tensor(STAGES.index(self.stage))

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the stage of a state."""
        self.set_stage(STAGES[int(state)])

    def _given(self) -> Tensor | None:
        """The gates that a model's draw has for this call, or None."""
        for board, place in self._places:
            if in_force(board.latest):
                z = board.latest.z[place]
                if z is not None:
                    if z.requires_grad and not torch.compiler.is_compiling():
                        board.latest.see_grad_mode()
                    return z
        return None

    def _compact_here(self) -> Compact | OnDevice | None:
        """What this call leaves out: a model's draw, which says so, holds in its forward alone."""
        if not self.training:
            return None
        for board, _ in self._places:
            compact = board.latest.compacts.get(id(self))
            if compact is not None and in_force(board.latest):
                return compact
        return None

    def _count(self, counts: OpenCounts, index: int = 0) -> None:
        """Leaves what a draw counted of its log_alpha for whoever asks `expected_open`."""
        if self.gate_index is not None:  # it has some of those gates
            return
        for board, place in self._places:
            of = id(self.log_alpha), self.log_alpha._version
            board.counted[place] = Counted(counts, index, of)

    def _forget_draws(self) -> None:
        """Nothing that was drawn for this layer holds any more."""
        for board, place in self._places:
            board.counted[place] = board.latest.z[place] = None
            board.latest.compacts.pop(id(self), None)

    def __getstate__(self) -> dict[str, Any]:
        # The boards belong to a model: its copy gives its layers places of their own.
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return {key: value for key, value in state.items() if key != "_places"}
