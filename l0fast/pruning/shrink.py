"""Progressive compaction: a gated model made smaller during its training, with its gates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.calls import Example
from l0fast.graph.sites import without_gates
from l0fast.graph.structure import structure_of
from l0fast.graph.tensors import ChannelTensor, part_of
from l0fast.layers.handle import gated_layers, gates, sharing
from l0fast.layers.serving import INDEX, ON_UNITS, likeliest
from l0fast.measures.counts import Counts, element_size
from l0fast.pruning.attributes import AttributePatch
from l0fast.pruning.draft import new_draft
from l0fast.pruning.edits import Edit, shrink_, sliced, weight_sides
from l0fast.pruning.gate_values import GateValues
from l0fast.pruning.plan import make_plan
from l0fast.pruning.proof import Proof
from l0fast.pruning.report import recipe_of
from l0fast.skipping.attach import attach_skipping

SELDOM = 0.01
"""A gate that is open more seldom than this may go for good."""
WORTH = 0.05
"""A removal waits until it can take so much of the gates that are left: it costs an export."""

Slice = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Removal:
    """What is removed at one time: how the layers get smaller, and which gates stay."""

    edits: list[Edit]
    patches: list[AttributePatch]
    gates: dict[str, list[int]]
    """Gated layer -> which of its gates stay, by number; layers that lose none are left out."""

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        return {
            "edits": [edit.as_json() for edit in self.edits],
            "mends": [patch.as_json() for patch in self.patches],
            "gates": self.gates,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Removal:
        """The removal of a checkpoint."""
        edits = [Edit.from_json(edit) for edit in entry["edits"]]
        patches = [AttributePatch.from_json(patch) for patch in entry["mends"]]
        return cls(edits, patches, {name: list(kept) for name, kept in entry["gates"].items()})


@dataclass
class Idle:
    """How long each gate has seldom been open, in epochs."""

    patience: int
    epochs: dict[str, Tensor] = field(default_factory=dict)
    """Gated layer -> [num_gates] epochs."""
    stuck: set[str] = field(default_factory=set)
    """Gated layers found to be ones whose gates cannot go."""

    @torch.no_grad()
    def count(self, model: nn.Module) -> dict[str, Tensor]:
        """Counts one more epoch: gated layer -> bool, the gates that may stay.

        The likeliest gate of each layer always does, and so do gates on single weights, branches
        and experts.
        """
        kept: dict[str, Tensor] = {}
        for owner, layers in sharing(gated_layers(model)).items():
            log_alpha = layers[owner].log_alpha
            stays = torch.ones(log_alpha.shape, dtype=torch.bool)
            for name, layer in layers.items():
                seldom = layer.own(layer.open_probability() < SELDOM).cpu()
                before = self.epochs.get(name, torch.zeros(seldom.shape, dtype=torch.int64))
                self.epochs[name] = (before + 1) * seldom
                if layer.gates in ON_UNITS:
                    # A gate that is closed once it is settled does not come back.
                    own = ~seldom if layer.settled else self.epochs[name] < self.patience
                    stays[layer.places().cpu()] = own
            if layers[owner].gates in ON_UNITS:
                stays |= likeliest(layers.values(), log_alpha).cpu()
            if not self.stuck.isdisjoint(layers):
                stays.fill_(True)
            kept.update(dict.fromkeys(layers, stays))
        return kept

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"epochs": dict(self.epochs), "stuck": sorted(self.stuck)}

    def set(self, state: Mapping[str, Any]) -> None:
        """Takes over what a checkpoint holds."""
        self.epochs = {name: epochs.cpu() for name, epochs in state["epochs"].items()}
        self.stuck = set(state["stuck"])

    def follow(self, removal: Removal) -> None:
        """Forgets the gates that are gone."""
        for name, stay in removal.gates.items():
            if name in self.epochs:
                self.epochs[name] = self.epochs[name][stay]


def plan_removal(
    model: nn.Module, example: Example, kept: dict[str, Tensor]
) -> tuple[Removal | None, set[str]]:
    """What can go, with neither gather nor scatter, if only the gates of `kept` can open; and the
    layers that stand in the way.

    A layer that would need one keeps all its gates; so do all layers, where something else stands
    in the way (a constant that a closed unit leaves, a weight that another layer reads too).
    """
    layers = gated_layers(model)
    kept = {name: mask.clone() for name, mask in kept.items()}
    found: set[str] = set()
    while not all(bool(mask.all()) for mask in kept.values()):
        values, structure = GateValues(layers, kept, fully_open=True), structure_of(model, example)
        proof = Proof(model, values, example, structure.more_in_training, structure.added)
        plan = make_plan(new_draft(model, values, structure), structure, proof.check, anew=False)
        stuck = {e.name for e in plan.edits if e.gather or e.scatter or e.scale}
        stuck |= {name for name, extent in plan.constants.items() if bool(extent.any())}
        if not stuck:
            removal = _removal(model, list(plan.edits), plan.attributes)
            return removal, found if removal is not None else set(kept)
        whole = stuck & {name for name, mask in kept.items() if not bool(mask.all())}
        for name in whole or kept:
            kept[name].fill_(True)
            found.add(name)
    return None, found


def worthwhile(kept: Mapping[str, Tensor]) -> bool:
    """Whether enough gates would go."""
    gone = sum(int((~mask).sum()) for mask in kept.values())
    return gone >= WORTH * sum(mask.numel() for mask in kept.values())


def _removal(model: nn.Module, edits: list[Edit], patches: list[AttributePatch]) -> Removal | None:
    """The removal of a plan, or None if a layer would keep a part of what one gate serves."""
    stays: dict[str, list[int]] = {}
    by_name = {edit.name: edit for edit in edits}
    for name, layer in gated_layers(model).items():
        edit = by_name.get(name)
        units = (
            None
            if edit is None or layer.gates == "weight"
            else (edit.inputs if layer.gates == "input" else edit.outputs)
        )
        if edit is not None and layer.gates == "weight":
            return None
        if units is None:
            continue
        stay = sorted({unit // layer.units for unit in units})
        if len(stay) * layer.units != len(units):
            return None
        stays[name] = stay
    return Removal(edits, patches, stays) if edits else None


def remove_(
    model: nn.Module,
    removal: Removal,
    example: Example,
    skip: str | bool,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Carries a removal out, in place: on the layers, their gates, and the optimizer's state.

    The layers are the same objects, so constraints go on; they still count against the size that
    the model had at first. Its handle keeps the recipe, to which `prune` adds its own.
    """
    handle, earlier = gates(model), recipe_of(model)
    if earlier.dense is None:
        with without_gates(model) as plain:
            dense = Counts.of(plain, example, element_size(model), {}).whole()
        earlier = replace(earlier, dense=dense)
    layers = handle.layers
    for layer in layers.values():
        layer.remember_size()
    replaced: dict[int, tuple[nn.Parameter, Slice]] = {}

    def note(old: nn.Parameter, new: nn.Parameter, part: Slice) -> None:
        replaced[id(old)] = new, part

    for patch in removal.patches:
        patch.apply(model)
    for edit in removal.edits:
        module = part_of(model, edit.name)
        if isinstance(module, ChannelTensor):
            whole: Any = module.tensor
            module.put(sliced(whole.detach(), edit, module.sides))
            note(whole, module.tensor, lambda v, e=edit, s=module.sides: sliced(v, e, s))  # type: ignore[arg-type]
            continue
        log_alpha = module._parameters.pop("log_alpha", None)
        index = module._buffers.pop(INDEX, None)
        before = dict(module._parameters)
        sides = weight_sides(module)
        shrink_(module, edit)
        for name, old in before.items():
            if old is not None:
                # An embedding and its head have one weight, and lose the same of it.
                new: Any = replaced.get(id(old), (module._parameters[name],))[0]
                module._parameters[name] = new
                note(old, new, lambda v, e=edit, s=sides: sliced(v, e, s))
        if log_alpha is not None:
            module._parameters["log_alpha"] = log_alpha
        if index is not None:
            module._buffers[INDEX] = index
    for owner, readers in sharing(layers).items():
        if not removal.gates.keys().isdisjoint(readers):
            old = layers[owner].log_alpha
            stay = _keep_gates(readers, removal.gates)
            note(old, layers[owner].log_alpha, lambda v, i=stay: v[i].clone())
    if optimizer is not None:
        _follow(optimizer, replaced)
    handle.removed = replace(
        earlier,
        layers=[*earlier.layers, *(edit.as_json() for edit in removal.edits)],
        attributes=[*earlier.attributes, *(patch.as_json() for patch in removal.patches)],
    )
    attach_skipping(model, example, skip)


def _keep_gates(readers: Mapping[str, Any], gates: Mapping[str, list[int]]) -> Tensor:
    """Takes gates from layers that share them: what stays of their log_alpha, in order."""
    old = next(iter(readers.values())).log_alpha
    places = {name: layer.places() for name, layer in readers.items()}
    left = {name: own[gates[name]] if name in gates else own for name, own in places.items()}
    stay = torch.cat(list(left.values())).unique()
    new = nn.Parameter(old.detach()[stay].clone(), old.requires_grad)
    for name, layer in readers.items():
        if layer.gate_index is not None:
            layer.set_index(torch.searchsorted(stay, left[name]))
        layer._parameters["log_alpha"] = new
        layer._forget_draws()
    return stay


def _follow(optimizer: torch.optim.Optimizer, replaced: Mapping[int, Any]) -> None:
    """Gives an optimizer the smaller parameters, and what of their state belongs to them."""
    for group in optimizer.param_groups:
        for place, old in enumerate(group["params"]):
            if id(old) not in replaced:
                continue
            new, part = replaced[id(old)]
            group["params"][place] = new
            state = optimizer.state.pop(old, {})
            if state:
                optimizer.state[new] = {
                    key: part(value)
                    if isinstance(value, Tensor) and value.shape == old.shape
                    else value
                    for key, value in state.items()
                }
