"""What `prune` says of its result: a row for each layer, and the whole as a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from l0fast._tables import aligned
from l0fast.layers.gated import Gated
from l0fast.measures.amounts import words
from l0fast.removal.plan import Plan

REPORT_FORMAT = 1


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
        "kind": type(site.layer).__name__,
        "gates": gates,
        "gates_open": 0 if kept is None else int(kept.sum()),
        "gates_total": 0 if kept is None else kept.numel(),
        "forced": forced,
        "in": list(inputs),
        "out": list(outputs),
        "status": status,
        "reason": "; ".join(reason for reason in reasons if reason),
    }


def format_report(report: Mapping[str, Any]) -> str:
    """A pruned model's report as a text with a table, one line a layer."""
    head = ("layer", "kind", "gates", "open", "in", "out", "status", "reason")
    rows: list[tuple[str, ...]] = [head]
    for site in report["sites"]:
        gates = "-" if site["gates"] is None else site["gates"]
        opened = "-" if site["gates"] is None else f"{site['gates_open']}/{site['gates_total']}"
        if site["forced"]:
            opened += f" ({site['forced']} forced)"
        sizes = (f"{site[side][0]}/{site[side][1]}" for side in ("in", "out"))
        rows.append(
            (site["name"], site["kind"], gates, opened, *sizes, site["status"], site["reason"])
        )
    lines = aligned(rows, left=len(head))
    for name, group in report["groups"].items():
        by = group["measure"]
        kept, total = (words(group[key], by) for key in ("kept", "total"))
        lines.append(
            f"{name}: {by} {group['density']:.4f} of at most {group['target']:g} ({kept} of "
            f"{total}), {group['forced']} gates forced closed"
        )
    if report["collapsed"]:
        names = ", ".join(report["collapsed"])
        lines.append(f"collapsed: all gates of {names} are closed, nothing passes through")
    for what, key in (("parameters", "params"), ("MACs", "macs"), ("activation bytes", "memory")):
        after, before = report[key]
        share = f" ({after / before:.2%})" if before else ""
        lines.append(f"{what}: {after:,} of {before:,}{share}")
    if report["latency"]:
        after, before = (words(seconds, "latency") for seconds in report["latency"])
        lines.append(f"measured latency: {after}, dense {before}")
    size = report["round_to"]
    if size > 1:
        odd = [
            f"{site['name']} {side} {site[side][0]}"
            for site in report["sites"]
            for side in ("in", "out")
            if site[side][0] % size and site[side][0] < site[side][1]
        ]
        but = f", but {', '.join(odd)}" if odd else ""
        lines.append(f"widths in multiples of {size} ({report['filled']} gates filled up){but}")
    lines.append(f"architecture: {report['architecture']} ({report['tier']})")
    for mend in report["attributes"]:
        name = f"{mend['name']}.{mend['attribute']}".lstrip(".")
        lines.append(f"{name}: {mend['value'][0]} instead of {mend['value'][1]}")
    lines.append(f"largest error: {report['max_error']:.3g} (allowed {report['tolerance']:g})")
    lines.extend(report["notes"])
    return "\n".join(lines)
