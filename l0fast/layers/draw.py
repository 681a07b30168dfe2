"""One draw for a whole model: all its gates are sampled, and counted, as its forward starts."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast import functional
from l0fast.layers.ties import attach_ties, detach_ties
from l0fast.maths.compaction import Order
from l0fast.maths.hard_concrete import HardConcrete

_MEMBERS = "_l0fast_gated"
"""Attribute of a model that draws: its gated layers, so that no step has to look for them."""
SKIPPING = "_l0fast_skipping"
"""Attribute of a model that draws: which closed units a step leaves out (see `skipping`)."""


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


def gated_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> gated layer, in the model's order, each layer once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Drawn)}


def gate_owners(layers: Mapping[str, Any]) -> dict[str, str]:
    """Name of each gated layer -> the first of those that share its gates, perhaps itself."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(layer.log_alpha), name) for name, layer in layers.items()}


def own_gates(layers: Mapping[str, Any]) -> list[str]:
    """The names of the gated layers whose gates are not those of an earlier one."""
    return list(dict.fromkeys(gate_owners(layers).values()))


def _members(model: nn.Module) -> list[Drawn]:
    """The layers that the model draws for; one put into it since then draws its own gates."""
    return model.__dict__.get(_MEMBERS, [])


def draw_gates(model: nn.Module, inputs: Any = (), options: Any = None) -> None:
    """Forward pre-hook: samples the gates of all the model's layers in one op."""
    # By distribution, device and dtype: each log_alpha, and the layers that share it.
    groups: dict[Any, dict[int, tuple[Tensor, list[Drawn]]]] = {}
    members: dict[int, tuple[Tensor, list[Drawn]]] = {}
    last: Any = None, None, None
    for layer in _members(model):
        if not layer.training or layer.noise == "example" or layer.gates == "weight":
            continue
        drawn = layer._drawn[1]
        if drawn.live and drawn.owner != id(model):
            continue  # an outer model of this one has drawn already
        log_alpha = layer.log_alpha
        key = layer.distribution, log_alpha.device, log_alpha.dtype, layer.settled
        if key[0] is not last[0] or key[1:] != last[1:]:  # hashing it costs more than all else here
            members, last = groups.setdefault(key, {}), key
        members.setdefault(id(log_alpha), (log_alpha, []))[1].append(layer)
    opened: dict[int, Tensor] = {}
    skip = None if torch.compiler.is_compiling() else model.__dict__.get(SKIPPING)
    draw = NOT_DRAWN[1]
    if skip is not None:
        skip.clear(model)  # a forward that was interrupted leaves its own behind
    for (distribution, _, dtype, settled), members in groups.items():
        draw = Draw(id(model))
        log_alphas, layers = zip(*members.values(), strict=True)
        sizes = tuple(log_alpha.numel() for log_alpha in log_alphas)
        flat = torch.cat(log_alphas)
        work = flat.float() if dtype in (torch.float16, torch.bfloat16) else flat
        if settled:  # the same in every forward, and with nothing to count
            z = distribution.median(work)
        else:
            z, totals = functional.draw(work, sizes, distribution)
            if not torch.compiler.is_compiling() and totals.grad_fn is not None:
                for earlier in {layer._drawn[1] for sharing in layers for layer in sharing}:
                    draw.earlier += earlier.waiting()
                draw.node = weakref.ref(totals.grad_fn)
            draw.count(totals, layers)
        for sharing, part in zip(layers, z.split(sizes), strict=True):
            for layer in sharing:
                # Past nn.Module's own setattr, which looks for parameters: this is each step's
                # cost.
                layer.__dict__["_drawn"] = part, draw
                layer.__dict__["_counted"] = draw
                layer.__dict__["_compact"] = None
        if skip is not None:
            parts = (z > 0).split(sizes)
            for sharing, part in zip(layers, parts, strict=True):
                for layer in sharing:
                    opened[id(layer)] = layer.spread(part)
    if skip is not None and opened:
        skip.assign(opened, inputs, options or {}, draw)


def release_gates(model: nn.Module, _inputs: Any = None, _output: Any = None) -> None:
    """Forward hook: the model's draw is over; a layer called outside a forward draws its own."""
    for layer in _members(model):
        draw = layer._drawn[1]
        if draw.owner == id(model):
            draw.live = False


def attach_draw(model: nn.Module) -> None:
    """Makes `model` draw the gates of all its layers at the start of its forward."""
    model.__dict__[_MEMBERS] = list(gated_layers(model).values())
    if draw_gates not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(draw_gates, with_kwargs=True)
        model.register_forward_hook(release_gates, always_call=True)
    attach_ties(model)


def detach_draw(model: nn.Module) -> None:
    """Undoes `attach_draw`, on the model and all inside it."""
    for module in model.modules():
        module.__dict__.pop(_MEMBERS, None)
        detach_ties(module)
        for hooks, ours in (
            (module._forward_pre_hooks, draw_gates),
            (module._forward_hooks, release_gates),
        ):
            for key in [key for key, hook in hooks.items() if hook is ours]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)


@functools.lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def expected_open(layers: list[Any]) -> Tensor:
    """[L] expected number of open gates of each layer, differentiable.

    The counts that came with this training step's draw are handed out once, so that their
    gradient joins the gates' own backward; any other is computed from log_alpha.
    """
    draws = [layer._counted for layer in layers]
    taken = {draw: draw.take() for draw in set(draws)}
    places = [
        None if taken[draw] is None else draw.place(layer)
        for layer, draw in zip(layers, draws, strict=True)
    ]
    if len(taken) == 1 and None not in places:
        (totals,) = taken.values()
        assert totals is not None
        if places == list(range(totals.numel())):
            return totals.view(-1)
        return totals.view(-1).index_select(0, _index(tuple(places), totals.device))
    parts: list[Tensor] = []
    for layer, draw, place in zip(layers, draws, places, strict=True):
        totals = taken[draw]
        if totals is None or place is None:
            dtype = torch.promote_types(layer.log_alpha.dtype, torch.float32)
            parts.append(layer.open_probability().sum(dtype=dtype))
        else:
            parts.append(totals.view(-1)[place])
    return torch.stack(parts)
