"""Pruning of whole parts: closed branches and experts are cut out of the gated model; what is left
is then made smaller like any other model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from l0fast import _checks
from l0fast.graph.branches import Branch, branch_of
from l0fast.graph.calls import Example
from l0fast.graph.cuts import Cut, cut_, cut_names, plan_cut
from l0fast.graph.fewer import Fewer, expert_tensors, fewer_of
from l0fast.graph.sites import light_copy
from l0fast.graph.structure import Structure, structure_of
from l0fast.layers.branch import branch_gates
from l0fast.layers.experts import expert_gates
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gates
from l0fast.measures.counts import Counts
from l0fast.pruning.draft import Draft, new_draft
from l0fast.pruning.gate_values import GateValues
from l0fast.pruning.plan import Check, fault_of
from l0fast.pruning.report import recipe_of


def closed_in(layers: Mapping[str, Gated], kept: Mapping[str, Tensor]) -> list[Branch]:
    """The branches whose gates do not stay."""
    gated = branch_gates(layers).items()
    return [branch_of(name, gate) for name, gate in gated if not bool(kept[name].any())]


def lost_experts(model: nn.Module, values: GateValues) -> list[Fewer]:
    """The mixtures of a model that lose experts."""
    return fewer_of(model, expert_gates(values.layers), values.kept)


def copied_tensors(model: nn.Module, values: GateValues) -> set[str]:
    """The tensors of which a model without its closed experts has copies of parts."""
    lost = lost_experts(model, values)
    pairs = (place for one in lost for place in expert_tensors(model, one.mixture))
    return {f"{name}.{key}".lstrip(".") for name, key in pairs}


def by_old_names(
    counts: Counts, names: Mapping[str, str], model: nn.Module, widths: dict[str, tuple[int, int]]
) -> Counts:
    """Counts of a model without some branches or experts, by the names of the whole one.

    Args:
        counts: with one for each module of the smaller model.
        names: see `cut_names`.
        model: the whole one.
        widths: of the smaller model's layers, by the old names.
    """
    old = {name: 0 for name, _ in model.named_modules()}

    def named(of: Mapping[str, int]) -> dict[str, int]:
        return old | {names[name]: count for name, count in of.items() if name in names}

    return dataclasses.replace(
        counts,
        params=named(counts.params),
        macs=named(counts.macs),
        memory=named(counts.memory),
        widths=widths,
    )


@dataclass(frozen=True, eq=False)
class Shallow:
    """A gated model without its closed branches and experts."""

    model: nn.Module
    """The model itself, where none is closed, or a copy with the very parameters."""
    values: GateValues
    """Of the gates that are left."""
    structure: Structure
    names: Mapping[str, str]
    """Name of each module -> the one that it has in the whole model."""
    cut: Cut | None

    def old(self, name: str) -> str:
        """The name that a module, or a tensor, has in the whole model."""
        return name if self.cut is None else self.cut.old(name)

    def draft(self) -> Draft:
        """A new draft of it."""
        return new_draft(self.model, self.values, self.structure, names=self.names)


def cut_out(model: nn.Module, cut: Cut) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model that is cut, with the very parameters, and `cut_names`."""
    small = cut_(light_copy(model), cut)
    return small, cut_names(small, cut)


def _shallow(model: nn.Module, values: GateValues, example: Example, cut: Cut) -> Shallow:
    small, names = cut_out(model, cut)
    layers = gates(small).layers
    kept = {name: values.kept[names[name]] for name in layers}
    kept.update((name, kept[name][kept[name]]) for name in expert_gates(layers))
    left = GateValues(layers, kept, values.fully_open)
    return Shallow(small, left, structure_of(small, example), names, cut)


def shallow(
    model: nn.Module, values: GateValues, structure: Structure, example: Example, check: Check
) -> Shallow:
    """A gated model without its closed branches and experts: with whole blocks taken out where that
    holds.

    Args:
        model: with gates.
        values: of all its gates.
        structure: of it.
        example: of what it takes.
        check: whether a draft computes what the model does with these gates.

    Raises:
        ValueError: without a closed branch or expert the model is another.
    """
    closed = closed_in(values.layers, values.kept)
    experts = lost_experts(model, values)
    if not closed and not experts:
        names = {name: name for name, _ in model.named_modules()}
        return Shallow(model, values, structure, names, None)
    before = recipe_of(model)
    failure, done = "", (len(before.layers), len(before.attributes), len(before.views))
    plans = [plan_cut(model, closed, drop, done, experts) for drop in (True, False)]
    for cut in dict.fromkeys(plans):
        try:
            found = _shallow(model, values, example, cut)
            failure = fault_of(found.draft(), found.structure, check)
        except Exception as problem:
            failure = _checks.one_line(problem)
        else:
            if not failure:
                return found
    got = (
        f"{type(model).__name__}, which does not run without a closed branch or expert ({failure})"
    )
    _checks.refuse("model", got, "a model that runs without it: exclude it in sparsify_")
