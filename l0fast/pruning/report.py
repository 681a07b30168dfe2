"""What `prune` says of its result: a row for each layer, and the whole as a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from l0fast._tables import aligned
from l0fast.gating.attention import unfused_in
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gates, handle_of, own_gates
from l0fast.measures.amounts import words
from l0fast.measures.counts import Counts
from l0fast.measures.groups import Group, measure_name
from l0fast.measures.measure import GateMeasure
from l0fast.pruning.choose import Budget
from l0fast.pruning.plan import Plan

REPORT_FORMAT = 1


@dataclass(frozen=True)
class Report:
    """What `prune` has done; see `prune` for its fields. It holds what JSON knows."""

    format: int
    architecture: str
    density: float
    forced: int
    collapsed: list[str]
    round_to: int
    filled: int
    groups: dict[str, dict[str, Any]]
    params: list[int]
    macs: list[int]
    memory: list[int]
    latency: list[float] | None
    sites: list[dict[str, Any]]
    tier: str
    notes: list[str]
    max_error: float
    tolerance: float
    attention: list[dict[str, Any]]
    attributes: list[dict[str, Any]]
    folded: list[str]
    layers: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Report:
        """The report of such a dict.

        Raises:
            TypeError: it is none.
        """
        return cls(**entry)


@dataclass(frozen=True)
class Recipe:
    """How a model became smaller before, and what it was at first."""

    dense: dict[str, int] | None = None
    """Measure -> what the dense model had; None where nothing was removed in training."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    attributes: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)


_OURS, _BESIDE = "report", "l0fast_report"
"""Attribute of a pruned model that holds its report, and that where it has one of its own."""


def report_of(model: nn.Module) -> Report | None:
    """The report that `prune` left on a model, if it did."""
    found = (vars(model).get(name) for name in (_OURS, _BESIDE))
    return next((report for report in found if isinstance(report, Report)), None)


def attach_report(model: nn.Module, report: Report) -> None:
    """Leaves a report on a model, beside an attribute of the user's that has its name."""
    own = not isinstance(vars(model).get(_OURS), Report) and hasattr(model, _OURS)
    setattr(model, _BESIDE if own else _OURS, report)


def recipe_of(model: nn.Module) -> Recipe:
    """What was removed from a model before: during its training, or by an earlier `prune`."""
    handle = handle_of(model)
    if handle is not None and handle.removed is not None:
        return handle.removed
    report = report_of(model)
    if report is None:
        return Recipe()
    names = {one.name for one in fields(Recipe)} - {"dense"}
    return Recipe(**{name: getattr(report, name) for name in names})


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
    seconds: list[float] | None
    """Measured latency of the pruned and of the dense model."""


@dataclass(frozen=True)
class _GateCounts:
    """How the gates that stay differ from those that are open in evaluation, by layer."""

    forced: dict[str, int]
    """Closed by the targets."""
    filled: dict[str, int]
    """Kept, though closed."""
    collapsed: list[str]
    """Layers without an open gate."""


@torch.no_grad()
def _count_gates(layers: Mapping[str, Gated], kept: Mapping[str, Tensor]) -> _GateCounts:
    found = _GateCounts({}, {}, [])
    for name, layer in layers.items():
        is_open = (layer.evaluation_gates() > 0).cpu()
        found.forced[name] = int((is_open & ~kept[name]).sum())
        found.filled[name] = int((kept[name] & ~is_open).sum())
        if not bool((is_open & kept[name]).any()):
            found.collapsed.append(name)
    return found


def _whole(value: float) -> float:
    """A count as an int; a cost that is none stays as it is."""
    return int(value) if float(value).is_integer() else value


def _group_rows(
    layers: Mapping[str, Gated], facts: Facts, forced: Mapping[str, int]
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
            "forced": sum(
                forced[name] for name in own_gates({name: layers[name] for name in one.layers})
            ),
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
    counts, owning = _count_gates(layers, kept), own_gates(layers)
    changed = {edit.name for edit in plan.edits}
    sites = [
        site_row(
            name,
            plan,
            layers.get(name),
            kept.get(name),
            counts.forced.get(name, 0),
            name in counts.collapsed,
        )
        for name in plan.sites
        if name in layers or name in changed
    ]
    units = {"input": "in", "output": "out", "weight": "out"}
    gated = GateMeasure(layers, [Group(tuple(layers))])
    before = recipe_of(model)
    full, small = before.dense or dense.whole(), left.whole()
    return Report(
        format=REPORT_FORMAT,
        architecture="-".join(str(s[units[s["gates"]]][0]) for s in sites if s["gates"]),
        density=gated.spent(kept)[0] / gated.totals[0],
        forced=sum(counts.forced[name] for name in owning),
        collapsed=counts.collapsed,
        round_to=facts.round_to,
        filled=sum(counts.filled[name] for name in owning),
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
        attributes=[*before.attributes, *(patch.as_json() for patch in plan.patches)],
        folded=sorted({*before.folded, *plan.constants}),
        layers=[*before.layers, *(edit.as_json() for edit in plan.edits)],
    )


def site_row(
    name: str,
    plan: Plan,
    layer: Gated | None,
    kept: Tensor | None,
    forced: int,
    collapsed: bool,
) -> dict[str, Any]:
    """The row of one layer."""
    site, extent = plan.sites[name], plan.extents[name]
    edit = next((edit for edit in plan.edits if edit.name == name), None)
    gates = None if layer is None else layer.gates
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
        "forced": forced,
        "in": list(inputs),
        "out": list(outputs),
        "status": status,
        "reason": "; ".join(reason for reason in reasons if reason),
    }


def format_report(report: Report) -> str:
    """A pruned model's report as a text with a table, one line a layer."""
    head = ("layer", "kind", "gates", "open", "in", "out", "status", "reason")
    rows: list[tuple[str, ...]] = [head]
    for site in report.sites:
        gates = "-" if site["gates"] is None else site["gates"]
        opened = "-" if site["gates"] is None else f"{site['gates_open']}/{site['gates_total']}"
        if site["forced"]:
            opened += f" ({site['forced']} forced)"
        sizes = (f"{site[side][0]}/{site[side][1]}" for side in ("in", "out"))
        rows.append(
            (site["name"], site["kind"], gates, opened, *sizes, site["status"], site["reason"])
        )
    lines = aligned(rows, left=len(head))
    for name, group in report.groups.items():
        by = group["measure"]
        kept, total = (words(group[key], by) for key in ("kept", "total"))
        lines.append(
            f"{name}: {by} {group['density']:.4f} of at most {group['target']:g} ({kept} of "
            f"{total}), {group['forced']} gates forced closed"
        )
    if report.collapsed:
        names = ", ".join(report.collapsed)
        lines.append(f"collapsed: all gates of {names} are closed, nothing passes through")
    for what, key in (("parameters", "params"), ("MACs", "macs"), ("activation bytes", "memory")):
        after, before = getattr(report, key)
        share = f" ({after / before:.2%})" if before else ""
        lines.append(f"{what}: {after:,} of {before:,}{share}")
    if report.latency:
        after, before = (words(seconds, "latency") for seconds in report.latency)
        lines.append(f"measured latency: {after}, dense {before}")
    size = report.round_to
    if size > 1:
        odd = [
            f"{site['name']} {side} {site[side][0]}"
            for site in report.sites
            for side in ("in", "out")
            if site[side][0] % size and site[side][0] < site[side][1]
        ]
        but = f", but {', '.join(odd)}" if odd else ""
        lines.append(f"widths in multiples of {size} ({report['filled']} gates filled up){but}")
    lines.append(f"architecture: {report['architecture']} ({report['tier']})")
    for patch in report.attributes:
        name = f"{patch['name']}.{patch['attribute']}".lstrip(".")
        lines.append(f"{name}: {patch['value'][0]} instead of {patch['value'][1]}")
    lines.append(f"largest error: {report['max_error']:.3g} (allowed {report['tolerance']:g})")
    lines.extend(report.notes)
    return "\n".join(lines)
