"""A trial of pruning: what closed gates would leave of a model, found without its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from l0fast.graph.calls import Example
from l0fast.graph.capture import layer_size, sites_in
from l0fast.graph.cuts import Cut, plan_cut
from l0fast.graph.dependencies import GateDependencies
from l0fast.graph.exporting import quietly
from l0fast.graph.fewer import expert_tensors
from l0fast.graph.liveness import Liveness
from l0fast.graph.nodes import shape_of
from l0fast.graph.structure import Structure, structure_of
from l0fast.graph.tensors import channel_tensor
from l0fast.layers.branch import branch_gates
from l0fast.layers.experts import expert_gates
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gates, sharing
from l0fast.layers.serving import ON_UNITS, likeliest
from l0fast.measures.branches import share_of
from l0fast.measures.counts import Counts, element_size
from l0fast.measures.flops import output_shapes
from l0fast.measures.trial import Trial
from l0fast.pruning.depth import by_old_names, closed_in, cut_out, lost_experts
from l0fast.pruning.draft import Draft, new_draft
from l0fast.pruning.gate_values import GateValues, all_gates
from l0fast.pruning.outcome import Outcome
from l0fast.pruning.plan import Plan, make_plan


def widths_left(plan: Plan) -> dict[str, tuple[int, int]]:
    """Layer -> (inputs, outputs) that it computes with, as a plan leaves it."""
    return {
        name: (int(extent.columns.sum()), int(extent.rows.sum()))
        for name, extent in plan.extents.items()
    }


def half_closed(layers: Mapping[str, Gated]) -> dict[str, Tensor]:
    """Layer -> bool, of log_alpha's shape: half of its gates stay, by chance, and one at least; all
    branches and experts stay."""
    kept: dict[str, Tensor] = {}
    chance = torch.Generator().manual_seed(0)
    for owner, alike in sharing(layers).items():
        stays = torch.ones(layers[owner].log_alpha.shape, dtype=torch.bool)
        if layers[owner].gates in ON_UNITS:
            scores = torch.randperm(stays.numel(), generator=chance)
            stays = (scores >= (stays.numel() + 1) // 2) | likeliest(alike.values(), scores)
        kept.update(dict.fromkeys(alike, stays))
    return {name: kept[name] for name in layers}


def _opened(kept: Mapping[str, Tensor], layers: Mapping[str, Gated], live: Liveness | None) -> bool:
    """Opens gates on what a layer keeps although nobody reads it, in place; whether there are any.

    Such a layer is smaller than one whose gates are closed by training, as a unit is open.
    """
    found = False
    for name, layer in layers.items() if live is not None and live.kept else ():
        units = live.walk.inputs.get(name)  # type: ignore[union-attr]
        if layer.gates != "input" or units is None:
            continue
        read = torch.isin(live.walk.classes[units.labels], torch.tensor(live.kept))  # type: ignore[union-attr]
        places = layer.places().cpu()[read.view(-1, layer.units).any(1)]
        found |= not bool(kept[name][places].all())
        kept[name][places] = True
    return found


def _cut(
    model: nn.Module,
    structure: Structure,
    full: Mapping[str, tuple[int, int]],
    fake: FakeTensorMode | None,
    counted: Callable[[dict[str, tuple[int, int]], nn.Module], Counts],
) -> tuple[Mapping[str, Tensor], Counts] | None:
    """The gates that stay where only branches and experts are closed, and what is left then; None
    where none has a gate."""
    layers = gates(model).layers
    branches, experts = list(branch_gates(layers)), expert_gates(layers)
    if not branches and not experts:
        return None
    opened = all_gates(layers)
    opened.update((name, torch.zeros_like(opened[name])) for name in branches[::2])
    for name, gate in experts.items():
        opened[name][max(gate.least, gate.all_gates // 2) :] = False
    lost = lost_experts(model, GateValues(layers, opened))
    closed = closed_in(layers, opened)

    def what_is_left(way: Cut) -> Counts:
        small, names = cut_out(model, way)
        rest = gates(small).layers
        plain = Draft(small, GateValues(rest, all_gates(rest)), structure.raw(layers), fake).model
        counts = counted({}, plain)
        left = {name: widths for name, widths in full.items() if not way.takes(name)}
        for one in way.experts:
            router = one.mixture.path(one.mixture.router)
            if router in left:
                left[router] = left[router][0], len(one.kept)
        return by_old_names(counts, names, model, left)

    dropped, kept = (plan_cut(model, closed, drop, experts=lost) for drop in (True, False))
    try:
        return opened, what_is_left(dropped)
    except Exception:  # its forward may read a list of modules by their places
        return opened, what_is_left(kept)


def _shares(
    model: nn.Module, needs: GateDependencies, dense: Counts, structure: Structure
) -> dict[str, dict[str, float]]:
    """Measure -> what is counted apart from layers: for each expert, by `share_of` (other experts
    do what a closed one did), and the MACs of recurrent layers' input weights, by their names."""
    found: dict[str, dict[str, float]] = {"params": {}, "macs": {}, "memory": {}}
    for node, names in {} if structure.trace is None else structure.trace.recurrent.items():
        given: Any = node.args[0]
        *outer, _ = shape_of(given) or (0, 0)
        places = math.prod(outer)
        for name in names:
            weight: Any = channel_tensor(model, name)
            found["macs"][name] = places * weight.tensor.numel()
    for _, mixture in needs.experts:
        router, held = mixture.path(mixture.router), expert_tensors(model, mixture)
        for name in needs.experts.shared(mixture):
            own = model.get_submodule(name)._parameters
            sizes = [own.get(key) for of, key in held if of == name]
            each = {
                "params": sum(0 if one is None else one.numel() for one in sizes),
                "macs": dense.macs[name] if name == router else 0,
                "memory": dense.memory[name] if name == router else 0,
            }
            for measure, amount in each.items():
                for place in range(mixture.number):
                    found[measure][share_of(name, place)] = amount / mixture.number
    return found


def _tried(
    model: nn.Module, structure: Structure, example: Example, fake: FakeTensorMode | None
) -> tuple[Trial, Plan]:
    layers = gates(model).layers
    kept = half_closed(layers)
    values = GateValues(layers, kept, fully_open=True)
    draft = new_draft(model, values, structure, fake)
    size = element_size(model)
    full = {name: layer_size(layer) for name, layer in sites_in(model).items()}
    if structure.trace is not None:
        held = [(name, channel_tensor(model, name)) for name in structure.trace.held.values()]
        full |= {name: layer_size(one) for name, one in held if one is not None}

    def own() -> Example:
        return example.copy() if fake is None else example.map(fake.from_tensor)

    def counted(widths: dict[str, tuple[int, int]], plain: nn.Module | None = None) -> Counts:
        with draft.mode():
            return Counts.of(draft.model if plain is None else plain, own(), size, widths)

    dense = counted(full)
    cut = _cut(model, structure, full, fake, counted)

    def check(_: Draft) -> Outcome:
        with draft.mode():
            shapes = output_shapes(draft.model, own())
        # Where export refuses the model, the sizes of its outputs may depend on the data.
        same = bool(structure.failure) or shapes == dense.outputs
        return Outcome(0.0, "" if same else "its outputs have other shapes")

    plan = make_plan(draft, structure, check)
    while _opened(kept, layers, plan.live):
        draft = new_draft(model, values, structure, fake)
        plan = make_plan(draft, structure, check)
    on_units = {name: layer for name, layer in layers.items() if layer.gates != "weight"}
    known = plan.sites, plan.scaled, plan.live, plan.rigid
    dependencies = GateDependencies(on_units, *known)
    picked = any(one.is_list and not one.every for _, one in dependencies.experts)
    trial = Trial(
        structure=structure,
        sites=plan.sites,
        shrinking=tuple(plan.shrinking),
        held=tuple(plan.held),
        live=plan.live,
        dependencies=dependencies,
        by_token=GateDependencies(on_units, *known, by_token=True) if picked else dependencies,
        kept=values.kept,
        dense=dense,
        left=counted(widths_left(plan)),
        cut=cut,
        shares=_shares(model, dependencies, dense, structure),
        element_size=size,
    )
    return trial, plan


def tried(model: nn.Module, example: Example) -> tuple[Trial, Plan]:
    """Prunes with about half of the units closed, for the shapes alone; the handle keeps what was
    found as long as the model's structure stays.

    Args:
        model: with gates.
        example: of what it takes.
    """
    handle, structure = gates(model), structure_of(model, example)
    if handle.trial is None or handle.trial[0].structure is not structure:
        try:
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            with quietly():  # what does not fit is tried out
                handle.trial = _tried(model, structure, example, fake)
        except Exception:  # its forward asks for values
            handle.trial = _tried(model, structure, example, None)
    return handle.trial


def known_dense(model: nn.Module, structure: Structure) -> Counts | None:
    """What a trial has counted of the dense model, if there was one."""
    found = gates(model).trial
    return found[0].dense if found is not None and found[0].structure is structure else None
