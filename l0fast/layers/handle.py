"""What l0fast keeps with a model: one handle, reached by `gates(model)`.

A training step of a model that `sparsify_` has prepared, from top to bottom:

1. The model's forward starts. `draw_gates`, a forward pre-hook, samples the gates of all layers by
   one op for each distribution, dtype and device, and puts them on the handle's board.
2. `skip_closed` (in `skipping`), the next pre-hook, says which units each layer leaves out.
3. Each gated layer takes its gates from the board and multiplies them in (see `gated`).
4. The forward ends. `release_gates` ends the draw.
5. The constraint asks `expected_open` for the counts of that draw and forms its term.
6. After the optimizer's step the constraint moves its multipliers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks, functional
from l0fast._tables import aligned
from l0fast.layers.draw import Board, Draw, Drawn, OpenCounts
from l0fast.layers.hooks import remove_hooks
from l0fast.layers.ties import ATTRIBUTE, attach_ties, detach_ties


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


class ModelGates:
    """What l0fast keeps with one model; it prints as a table of the gated layers.

    Attributes:
        layers: name -> gated layer, in the model's order.
        structure: what the model's graph says of its units (see `graph.structure`), or None as long
            as nobody has given an example.
        trial: what a trial of pruning found (see `pruning.trial`), or None.
        skipping: which closed units a training step leaves out (see `skipping`), or None.
        removed: what progressive compaction has removed so far (see `pruning.shrink`), or None.
        sharing: while a state is loaded: name of each layer that shares its gates -> the first that
            has them, perhaps itself.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.structure: Any = None
        self.trial: Any = None
        self.skipping: Any = None
        self.removed: Any = None
        self.sharing: dict[str, str] = {}
        self._constraints: list[weakref.ref[Any]] = []
        self._set_layers(layers)

    def _set_layers(self, layers: Mapping[str, Any]) -> None:
        """Gives every layer its place on a new board."""
        former: Any = getattr(self, "board", None)
        if former is not None:
            self._leave(former)
        self.layers: dict[str, Any] = dict(layers)
        self.board = Board(len(self.layers))
        self._drawn = list(self.layers.values())
        for place, layer in enumerate(self._drawn):
            layer.__dict__["_places"] = (*layer._places, (self.board, place))

    def _leave(self, board: Board) -> None:
        for layer in self._drawn:
            places = tuple(one for one in layer._places if one[0] is not board)
            layer.__dict__["_places"] = places

    def follow(self, model: nn.Module) -> None:
        """Takes over the gated layers that the model has now."""
        found = gated_layers(model)
        same = list(found) == list(self.layers)
        if not same or any(found[name] is not layer for name, layer in self.layers.items()):
            self._set_layers(found)

    # --- constraints --------------------------------------------------------------------------

    @property
    def constraints(self) -> tuple[Any, ...]:
        """The constraints and penalties on this model that are alive, the oldest first."""
        alive = ((ref, ref()) for ref in self._constraints)
        found = [(ref, constraint) for ref, constraint in alive if constraint is not None]
        self._constraints = [ref for ref, _ in found]
        return tuple(constraint for _, constraint in found)

    def add_constraint(self, constraint: nn.Module) -> None:
        """Notes a constraint, by a weak reference: one that is deleted is gone."""
        self._constraints.append(weakref.ref(constraint))

    def forget_constraints(self) -> None:
        """From here on no target of before holds, whether its constraint is alive or not."""
        self._constraints = []

    # --- the gates ----------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether the gates are decided; all of them are, or none."""
        return all(layer.settled for layer in self.layers.values())

    def __str__(self) -> str:
        owners = gate_owners(self.layers)
        rows = [("layer", "kind", "gates", "open", "of", "expected", "shared with")]
        with torch.no_grad():
            for name, layer in self.layers.items():
                opened = int((layer.evaluation_gates() > 0).sum())
                expected = float(layer.open_probability().double().mean())
                shared = "" if owners[name] == name else owners[name]
                counts = str(opened), str(layer.num_gates), f"{expected:.4f}"
                rows.append((name, type(layer).__name__, layer.gates, *counts, shared))
        lines = aligned(rows, left=3)
        lines.append("settled" if self.settled else "not settled")
        lines += [str(constraint) for constraint in self.constraints]
        if self.skipping is not None:
            lines.append(f"skipping: {len(self.skipping.links)} links")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"ModelGates({len(self.layers)} layers)"

    # --- copies -------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelGates:
        new = ModelGates.__new__(ModelGates)
        memo[id(self)] = new
        new.structure, new.trial = self.structure, self.trial  # frozen
        new.removed, new.sharing = self.removed, {}
        new._constraints = list(self._constraints)
        new._set_layers({name: copy.deepcopy(layer, memo) for name, layer in self.layers.items()})
        new.skipping = copy.deepcopy(self.skipping, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "skipping": self.skipping, "removed": self.removed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.structure = self.trial = None
        self._constraints, self.sharing = [], {}
        self.skipping, self.removed = state["skipping"], state["removed"]
        self._set_layers(state["layers"])


def handle_of(model: nn.Module) -> ModelGates | None:
    """The handle that a module has, if it has one of its own."""
    return model.__dict__.get(ATTRIBUTE)


def handles_in(model: nn.Module) -> dict[str, ModelGates]:
    """Name of each part of a model that has a handle, "" for the model itself -> the handle."""
    found = ((name, handle_of(module)) for name, module in model.named_modules())
    return {name: handle for name, handle in found if handle is not None}


def gates(model: nn.Module) -> ModelGates:
    """The handle of a model with gates: its gated layers, constraints, structure and skipping.

    Args:
        model: a model with gated layers, prepared by `sparsify_` or built of them.

    Returns:
        The one `ModelGates` of this model; it prints as a table.

    Raises:
        ValueError: the model has no gates.
    """
    handle = handle_of(model)
    if handle is None:
        layers = gated_layers(model)
        if not layers:
            _checks.refuse("model", type(model).__name__, "a model with gates (see sparsify_)")
        handle = model.__dict__[ATTRIBUTE] = ModelGates(layers)
    handle.follow(model)
    return handle


# --- the draw ---------------------------------------------------------------------------------


def _drawn_outside(layer: Drawn, board: Board) -> bool:
    """Whether an outer model of this one has drawn for a layer already."""
    return any(
        other is not board and other.latest.live and other.latest.z[place] is not None
        for other, place in layer._places
    )


def draw_gates(model: nn.Module, _inputs: Any = None) -> None:
    """Forward pre-hook: samples the gates of all the model's layers in one op."""
    if getattr(model, "_is_replica", False):  # of nn.DataParallel: its layers draw their own
        return
    handle: ModelGates = model.__dict__[ATTRIBUTE]
    board = handle.board
    # By distribution, device and dtype: each log_alpha, and the layers that share it.
    groups: dict[Any, dict[int, tuple[Tensor, list[int]]]] = {}
    members: dict[int, tuple[Tensor, list[int]]] = {}
    last: Any = None, None, None
    for place, layer in enumerate(handle._drawn):
        if not layer.training or layer.noise == "example" or layer.gates == "weight":
            continue
        if len(layer._places) > 1 and _drawn_outside(layer, board):
            continue
        log_alpha = layer.log_alpha
        key = layer.distribution, log_alpha.device, log_alpha.dtype, layer.settled
        if key[0] is not last[0] or key[1:] != last[1:]:  # hashing it costs more than all else here
            members, last = groups.setdefault(key, {}), key
        members.setdefault(id(log_alpha), (log_alpha, []))[1].append(place)
    if not groups:
        return
    earlier = [] if torch.compiler.is_compiling() else board.latest.waiting()
    board.latest = draw = Draw(len(handle._drawn), True, earlier)
    for (distribution, _, dtype, settled), members in groups.items():
        log_alphas, sharing = zip(*members.values(), strict=True)
        _draw_group(handle, draw, log_alphas, sharing, distribution, dtype, settled)


def _draw_group(
    handle: ModelGates,
    draw: Draw,
    log_alphas: tuple[Tensor, ...],
    sharing: tuple[list[int], ...],
    distribution: Any,
    dtype: torch.dtype,
    settled: bool,
) -> None:
    """Samples the gates of one group, and puts them and their counts on the board."""
    layers = handle._drawn
    sizes = tuple(log_alpha.numel() for log_alpha in log_alphas)
    flat = torch.cat(log_alphas)
    work = flat.float() if dtype in (torch.float16, torch.bfloat16) else flat
    if settled:  # the same in every forward, and with nothing to count
        z = distribution.median(work)
    else:
        z, totals = functional.draw(work, sizes, distribution)
        if not torch.compiler.is_compiling() and totals.grad_fn is not None:
            draw.nodes.append(weakref.ref(totals.grad_fn))
        counts = OpenCounts(totals)
        for index, places in enumerate(sharing):
            for place in places:
                layers[place]._count(counts, index)
    for places, part in zip(sharing, z.split(sizes), strict=True):
        for place in places:
            draw.z[place] = part
            if len(layers[place]._places) > 1:
                _outdate(layers[place], handle.board)
    if handle.skipping is not None and not torch.compiler.is_compiling():
        draw.parts.append((z, sizes, [[layers[place] for place in places] for places in sharing]))


def _outdate(layer: Drawn, board: Board) -> None:
    """Drops what the other models of this layer drew for it."""
    for other, place in layer._places:
        if other is not board:
            other.latest.z[place] = None


def release_gates(model: nn.Module, _inputs: Any = None, _output: Any = None) -> None:
    """Forward hook: the model's draw is over; a layer called outside a forward draws its own."""
    handle: ModelGates = model.__dict__[ATTRIBUTE]
    handle.board.latest.live = False
    handle.board.latest.parts = []


def attach_draw(model: nn.Module) -> ModelGates:
    """Makes `model` draw the gates of all its layers at the start of its forward."""
    handle = gates(model)
    if draw_gates not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(draw_gates)
        model.register_forward_hook(release_gates, always_call=True)
    attach_ties(model)
    return handle


def detach(model: nn.Module) -> None:
    """Takes the handles and their hooks off a model and all inside it."""
    for module in model.modules():
        handle = module.__dict__.pop(ATTRIBUTE, None)
        if handle is not None:
            handle._leave(handle.board)
        detach_ties(module)
        remove_hooks(module, lambda hook: hook is draw_gates or hook is release_gates)
