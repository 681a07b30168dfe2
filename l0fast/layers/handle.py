"""What l0fast keeps with a model: one handle, reached by `gates(model)`.

A training step of a model that `sparsify_` has prepared, from top to bottom:

1. The model's forward starts. `draw_gates` (in `sampling`), a forward pre-hook, samples the gates
   of all layers by one op for each distribution, dtype and device, and puts them on the handle's
   board.
2. `skip_closed` (in `skipping`), the next pre-hook, says which units each layer leaves out.
3. Each gated layer takes its gates from the board and multiplies them in (see `gated`).
4. The forward ends. `release_gates` ends the draw.
5. The constraint asks `expected_open` for the counts of that draw and forms its term.
6. After the optimizer's step the constraint moves its multipliers.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast._tables import aligned
from l0fast.layers.draw import Board, Drawn
from l0fast.layers.ties import ATTRIBUTE


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


def sharing(layers: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The first of some gated layers that share a log_alpha -> all that do, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, owner in gate_owners(layers).items():
        found.setdefault(owner, {})[name] = layers[name]
    return found


def _adapted(model: nn.Module) -> Generator[tuple[str, Drawn, set[str]]]:
    """Path of each module with an adapter on a gated layer, that layer, and the names of what lies
    beside it and has parameters of its own, as peft builds such modules."""
    for path, module in model.named_modules():
        layer = module._modules.get("base_layer")
        if isinstance(layer, Drawn):
            beside = {name for name, one in module.named_modules() if one._parameters}
            yield path, layer, {name for name in beside if not name.startswith("base_layer")}


def note_adapters(model: nn.Module) -> None:
    """Marks layers that have just got gates and had adapters before: their gates were chosen with
    these in view."""
    for _, layer, beside in _adapted(model):
        if layer.beside is None:
            layer.beside = frozenset(beside)


def refuse_adapters(name: str, model: nn.Module) -> None:
    """Refuses adapters, such as LoRA, that were put on gated layers: they read units that the gates
    close, and they freeze the gates."""
    for path, layer, beside in _adapted(model):
        if not beside <= (layer.beside or frozenset()):
            words = f"an adapter on the gated layer {path}"
            _checks.refuse(name, words, "adapters put on before sparsify_, or on other layers")


class ModelGates:
    """What l0fast keeps with one model; it prints as a table of the gated layers.

    Attributes:
        layers: name -> gated layer, in the model's order.
        structure: what the model's graph says of its units (see `graph.structure`), or None as long
            as nobody has given an example.
        trial: what a trial of pruning found (see `pruning.trial`), or None.
        skipping: which closed units a training step leaves out (see `skipping`), or None.
        removed: what progressive compaction has removed so far (see `pruning.shrink`), or None.
        uniform: whether gates are decided so that layers which repeat keep as many units each.
        sharing: while a state is loaded: name of each layer that shares its gates -> the first that
            has them, perhaps itself.
    """

    def __init__(self, layers: Mapping[str, Any]) -> None:
        self.structure: Any = None
        self.trial: Any = None
        self.skipping: Any = None
        self.removed: Any = None
        self.uniform = False
        self.sharing: dict[str, str] = {}
        self._constraints: list[weakref.ref[Any]] = []
        self._copies: list[weakref.ref[ModelGates]] = []
        self._follows = False
        self._model: weakref.ref[nn.Module] | None = None
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
        self._model = weakref.ref(model)
        found = gated_layers(model)
        same = list(found) == list(self.layers)
        if not same or any(found[name] is not layer for name, layer in self.layers.items()):
            self._set_layers(found)

    def check_adapters(self, name: str) -> None:
        """Refuses adapters that the model has now (see `refuse_adapters`)."""
        model = None if self._model is None else self._model()
        if model is not None:
            refuse_adapters(name, model)

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
        self._follows = False
        self._constraints.append(weakref.ref(constraint))

    def forget_constraints(self) -> None:
        """From here on no target of before holds, whether its constraint is alive or not."""
        self._constraints = []

    # --- the gates ----------------------------------------------------------------------------

    @property
    def settled(self) -> bool:
        """Whether the gates are decided; all of them are, or none."""
        return all(layer.settled for layer in self.layers.values())

    @property
    def stage(self) -> str:
        """What the gates are (see `Drawn.stage`); all of them are the same."""
        return next(iter(self.layers.values())).stage

    def set_stage(self, stage: str) -> None:
        """Says what all gates are (see `Drawn.stage`), here and in the copies that follow."""
        for layer in self.layers.values():
            if layer.stage != stage:  # else what was drawn stays
                layer.set_stage(stage)
        self._copies = [ref for ref in self._copies if ref() is not None]
        for copied in (ref() for ref in self._copies):
            if copied is not None and copied._follows:
                copied.set_stage(stage)

    def parameters(self) -> list[nn.Parameter]:
        """The log_alpha of all gated layers, each once."""
        found = {id(layer.log_alpha): layer.log_alpha for layer in self.layers.values()}
        return list(found.values())

    def forget_counts(self) -> None:
        """Drops what the latest draw has counted, as when a backward has gone through it."""
        self.board.counted = [None] * len(self.layers)

    def __str__(self) -> str:
        owners = gate_owners(self.layers)
        rows = [("layer", "kind", "gates", "open", "of", "expected", "shared with")]
        with torch.no_grad():
            for name, layer in self.layers.items():
                opened = int(layer.own(layer.evaluation_gates() > 0).sum())
                expected = float(layer.own(layer.open_probability()).double().mean())
                shared = "" if owners[name] == name else owners[name]
                counts = str(opened), str(layer.num_gates), f"{expected:.4f}"
                rows.append((name, type(layer).__name__, layer.gates, *counts, shared))
        lines = aligned(rows, left=3)
        lines.append(f"gates: {', '.join(dict.fromkeys(one.stage for one in self._drawn))}")
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
        new.removed, new.uniform, new.sharing = self.removed, self.uniform, {}
        new._constraints = list(self._constraints)
        # An average of the weights is a copy: its gates are settled when the model's are, as long
        # as it has no constraint of its own.
        new._copies, new._follows, new._model = [], True, None
        self._copies.append(weakref.ref(new))
        new._set_layers({name: copy.deepcopy(layer, memo) for name, layer in self.layers.items()})
        new.skipping = copy.deepcopy(self.skipping, memo)
        return new

    def __getstate__(self) -> dict[str, Any]:
        kept = ("layers", "skipping", "removed", "uniform")
        return {key: getattr(self, key) for key in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.structure = self.trial = self._model = None
        self._constraints, self.sharing = [], {}
        self._copies, self._follows = [], False
        self.skipping, self.removed = state["skipping"], state["removed"]
        self.uniform = state["uniform"]
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
        TypeError: it is not a module.

    >>> model = l0fast.sparsify_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    >>> list(l0fast.gates(model).layers)
    ['0', '2']
    """
    handle = handle_of(_checks.module("model", model))
    if handle is None:
        layers = gated_layers(model)
        if not layers:
            _checks.refuse("model", type(model).__name__, "a model with gates (see sparsify_)")
        handle = model.__dict__[ATTRIBUTE] = ModelGates(layers)
    handle.follow(model)
    return handle
