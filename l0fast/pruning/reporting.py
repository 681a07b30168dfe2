"""Makes the report of a pruned model: a row for each layer and target, and what is left in all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.gating.attention import unfused_in
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gates, sharing
from l0fast.layers.part import PartGate
from l0fast.measures.counts import Counts
from l0fast.measures.groups import Group, measure_name
from l0fast.measures.measure import GateMeasure
from l0fast.pruning.choose import Budget
from l0fast.pruning.depth import Shallow
from l0fast.pruning.plan import Plan
from l0fast.pruning.report import REPORT_FORMAT, Report, recipe_of


@dataclass(frozen=True, eq=False)
class Facts:
    """What `prune` was asked for, and what came of it."""

    kept: Mapping[str, Tensor]
    """Gated layer -> bool, the gates that stay."""
    groups: Mapping[str, Group]
    budgets: list[Budget]
    spent: Mapping[str, float]
    """Name of each budget -> what is left of its measure."""
    round_to: int
    tolerance: float
    compared: list[str]
    """On what the two models were compared."""
    seconds: list[float] | None
    """Measured latency of the pruned and of the dense model."""
    left: Shallow
    """The model without its closed branches."""


@dataclass(frozen=True)
class _GateCounts:
    """How the gates that stay differ from those that are open in evaluation, by layer."""

    forced: dict[str, Tensor]
    """bool, of log_alpha's shape: closed by the targets."""
    filled: dict[str, Tensor]
    """The same: kept, though closed."""
    collapsed: list[str]
    """Layers without an open gate."""


@torch.no_grad()
def _count_gates(layers: Mapping[str, Gated], kept: Mapping[str, Tensor]) -> _GateCounts:
    found = _GateCounts({}, {}, [])
    for name, layer in layers.items():
        is_open = (layer.evaluation_gates() > 0).cpu()
        found.forced[name] = is_open & ~kept[name]
        found.filled[name] = kept[name] & ~is_open
        gone = not bool(layer.own(is_open & kept[name]).any())
        if gone and not isinstance(layer, PartGate):
            found.collapsed.append(name)
    return found


def _in_all(layers: Mapping[str, Gated], counts: Mapping[str, Tensor]) -> int:
    """How many gates of some layers count, each once."""
    total = 0
    for owner, readers in sharing(layers).items():
        had = torch.zeros(counts[owner].shape, dtype=torch.bool).flatten()
        for layer in readers.values():
            had[layer.places().cpu()] = True
        total += int((counts[owner].flatten() & had).sum())
    return total


def _whole(value: float) -> float:
    """A count as an int; a cost that is none stays as it is."""
    return int(value) if float(value).is_integer() else value


def _group_rows(
    layers: Mapping[str, Gated], facts: Facts, forced: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Name of each target -> what it asked for, and what is left."""
    return {
        one.name: {
            "layers": list(one.layers),
            "measure": measure_name(facts.groups[one.name].measure),
            "target": one.target,
            "density": facts.spent[one.name] / one.measure.totals[0],
            "kept": _whole(facts.spent[one.name]),
            "total": _whole(one.measure.totals[0]),
            "forced": _in_all({name: layers[name] for name in one.layers}, forced),
        }
        for one in facts.budgets
    }


def make_report(model: nn.Module, plan: Plan, facts: Facts, dense: Counts, left: Counts) -> Report:
    """The report of a model that was pruned by a plan.

    Args:
        model: the gated one.
        plan: as it was carried out.
        facts: of the call.
        dense, left: the plain model at full size, and the pruned one, counted.
    """
    layers, kept = gates(model).layers, facts.kept
    counts = _count_gates(layers, kept)
    changed = {edit.name for edit in plan.edits}
    sites = [
        site_row(
            name,
            plan,
            layers.get(old),
            kept.get(old),
            counts.forced.get(old),
            old in counts.collapsed,
        )
        for name, old in ((name, facts.left.old(name)) for name in plan.sites)
        if old in layers or name in changed
    ]
    units = {"input": "in", "output": "out", "weight": "out"}
    gated = GateMeasure(layers, [Group(tuple(layers))])
    before = recipe_of(model)
    full, small = before.dense or dense.whole(), left.whole()
    return Report(
        format=REPORT_FORMAT,
        architecture="-".join(str(s[units[s["gates"]]][0]) for s in sites if s["gates"]),
        density=gated.spent(kept)[0] / gated.totals[0],
        forced=_in_all(layers, counts.forced),
        collapsed=counts.collapsed,
        round_to=facts.round_to,
        filled=_in_all(layers, counts.filled),
        groups=_group_rows(layers, facts, counts.forced),
        params=[small["params"], full["params"]],
        macs=[small["macs"], full["macs"]],
        memory=[small["memory"], full["memory"]],
        latency=facts.seconds,
        sites=sites,
        tier=plan.tier,
        notes=list(plan.notes),
        max_error=plan.error,
        tolerance=facts.tolerance,
        attention=[call.as_json() for call in unfused_in(model)],
        attributes=[*before.attributes, *(patch.as_json() for patch in plan.attributes)],
        folded=sorted({*before.folded, *plan.constants}),
        layers=[*before.layers, *(edit.as_json() for edit in plan.edits)],
        compared=facts.compared,
        views=[*before.views, *(patch.as_json() for patch in plan.views)],
        cuts=[*before.cuts, *([] if facts.left.cut is None else [facts.left.cut.as_json()])],
    )


def site_row(
    name: str,
    plan: Plan,
    layer: Gated | None,
    kept: Tensor | None,
    forced: Tensor | None,
    collapsed: bool,
) -> dict[str, Any]:
    """The row of one layer."""
    site, extent = plan.sites[name], plan.extents[name]
    edit = next((edit for edit in plan.edits if edit.name == name), None)
    gates = None if layer is None else layer.gates
    if layer is not None and kept is not None and forced is not None:
        had = layer.places().unique().cpu()  # each once
        kept, forced = kept.flatten()[had], forced.flatten()[had]
    inputs = int(extent.columns.sum()), len(extent.columns)
    outputs = int(extent.rows.sum()), len(extent.rows)
    smaller = inputs[0] < inputs[1] or outputs[0] < outputs[1]
    reasons: list[str] = []
    status = "removed" if smaller else "kept"
    if edit is not None and edit.gather is not None:
        status = "compacted"
        source = f" from {extent.source}" if extent.source else ""
        reasons.append(f"gathers {inputs[0]} of the {edit.gather[1]} inputs that arrive{source}")
    if edit is not None and edit.scatter is not None:
        status = "compacted"
        readers = ", ".join(extent.stops) or "an op that makes no zeros of zeros"
        reasons.append(f"puts zeros back for {readers}" if not site.fixed else "puts zeros back")
    if name in plan.constants:
        folded = int((plan.constants[name] != 0).sum())
        reasons.append(f"its bias holds what {folded} constant inputs gave")
    reasons.append(site.fixed)
    groups = getattr(site.layer, "groups", 1)
    if groups > 1:
        reasons.append(f"it has {groups} groups, which go as wholes")
    if layer is not None and kept is not None:
        if gates == "weight":
            reasons.append("gates on single weights: zeros in a layer of the same shape")
        elif bool(kept.all()) and not collapsed:
            reasons.append("all gates are open")
        if edit is not None and edit.scale is not None:
            reasons.append("its gates are a factor on its units")
    if collapsed:
        stays = "" if gates == "weight" else ", one unit of zeros stays"
        reasons.append(f"collapsed: all its gates are closed{stays}")
    return {
        "name": name,
        "kind": site.kind,
        "gates": gates,
        "gates_open": 0 if kept is None else int(kept.sum()),
        "gates_total": 0 if kept is None else kept.numel(),
        "forced": 0 if forced is None else int(forced.sum()),
        "in": list(inputs),
        "out": list(outputs),
        "status": status,
        "reason": "; ".join(reason for reason in reasons if reason),
    }
