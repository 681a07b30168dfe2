"""From a model with gates to a smaller ordinary one: choose, plan, apply, prove, report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast._tables import aligned
from l0fast.budget import Budget, budget, choose, spent
from l0fast.compact import apply
from l0fast.constraint import TARGETS, DensityConstraint, L0Penalty
from l0fast.density import WHOLE_MODEL, count_macs, count_params, require_gated, target_groups
from l0fast.layers import Gated
from l0fast.plan import Plan, closed, fold, make_plan
from l0fast.proof import Proof, in_float64
from l0fast.sparsify import example_args, unwrapped

REPORT_FORMAT = 1


def _targets(model: nn.Module) -> dict[tuple[str, ...], float]:
    """The targets that constraints left on the model and its parts, by its layers' names."""
    return {
        tuple(f"{outer}.{name}" if outer else name for name in names): target
        for outer, module in model.named_modules()
        for names, target in module.__dict__.get(TARGETS, {}).items()
    }


def _budgets(
    model: nn.Module,
    layers: Mapping[str, Gated],
    target: float | Mapping[str, float] | None,
) -> list[Budget]:
    """What the gates may keep: by `target`, or by what the constraints left on the model."""
    if target is not None:
        groups = target_groups(model, target)
        return [budget(name, names, value, layers) for name, (names, value) in groups.items()]
    budgets: list[Budget] = []
    for names, value in _targets(model).items():
        for name in names:
            if name not in layers:
                expected = f"a target: the model's constraint names {name!r}, which has no gates"
                _checks.refuse("target", None, expected)
        title = WHOLE_MODEL if set(names) == set(layers) else ", ".join(names)
        budgets.append(budget(title, names, value, layers))
    return budgets


def _reference(
    model: nn.Module, args: tuple[Any, ...], kept: Mapping[str, Tensor]
) -> tuple[nn.Module, tuple[Any, ...], Proof]:
    """The gated model in evaluation with its surplus gates closed, in float64 if that runs."""
    try:
        twin, wide = closed(model, kept).double().eval(), in_float64(args)
        return twin, wide, Proof(twin, wide)
    except Exception:
        twin = closed(model, kept).eval()
    try:
        return twin, args, Proof(twin, args)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        shapes = [tuple(a.shape) if isinstance(a, Tensor) else type(a).__name__ for a in args]
        expected = f"what the model's forward takes ({type(error).__name__}: {reason[0][:200]})"
        raise ValueError(f"example_inputs: got {shapes}; expected {expected}") from error


def _site(
    name: str,
    plan: Plan,
    layer: Gated | None,
    kept: Tensor | None,
    forced: int,
    collapsed: bool,
) -> dict[str, Any]:
    """One row of the report."""
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


def prune(
    model: nn.Module, example_inputs: Any, target: float | Mapping[str, float] | None = None
) -> nn.Module:
    """A smaller ordinary model that computes what the gated one does in evaluation.

    Equals, on any input:
        model.eval()(x)      # with the gates that do not fit the target closed

    The gates that stay are those open in evaluation, by rank of their open probability, as many
    as the target allows; every layer with gates on units keeps its likeliest one. Closed units
    are then removed wherever the layers around them agree, and elsewhere left out of the layer's
    computation by a gather before or a scatter after it. The result is compared with the gated
    model in float64 (where the model runs in it) on the example and on noise of its shape, and
    what does not hold is undone and named. The model passed in is not changed.

    Args:
        model: a model with gates.
        example_inputs: what its forward takes (a tuple for several arguments).
        target: the density that the kept gates must not exceed: a number for the whole model, or
            layer name or glob pattern -> number. Default: the targets of the `DensityConstraint`s
            made for the model; without any, every open gate stays.

    Returns:
        A model of the same class, of plain PyTorch modules, in the same dtype, device and mode.
        Its attribute `report` is a dict (of what JSON knows):
            format: 1.
            architecture: units left along each gated layer's gated dimension, "198-233-100".
            density: parameters of kept gates / gated parameters.
            forced: how many gates the targets closed that were open in evaluation.
            collapsed: names of the gated layers without an open gate, through which nothing of
                the input passes (with gates on units, one unit of zeros stands for them).
            groups: name -> {layers, target, density, kept, limit, total, forced}: each target,
                with the parameters kept, allowed and gated (an empty dict without targets).
            params, macs: [after, before]; before is the dense model without gates, and the MACs
                are those of one forward of the example.
            sites: a dict for each gated layer, and for each other that changed: name, kind,
                gates ("input", "output", "weight" or None), gates_open, gates_total, forced,
                in and out ([kept, of]), status ("removed": closed units do not exist any more,
                "compacted": left out, with a gather or scatter; "kept": full size), reason.
            tier: how far layers could be merged; notes: what was undone, and why.
            max_error, tolerance: largest relative error found, and allowed.
            attributes: attributes of modules that followed a size, such as num_heads, a list of
                dicts: name, kind (of the module), attribute, value ([after, before]).
            layers: the recipe, a list of dicts in the order to apply: name, kind, in, out,
                inputs and outputs (the indices that stay, None for all), gather and scatter
                ([positions, of], None for none), scale ("input", "output" or None).

    Raises:
        ValueError: no gates, a target that leaves no unit for a layer, or an example that the
            model does not take.
        TypeError: a target of a wrong type.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (purged models).
    """
    model = unwrapped(model)
    layers = require_gated(model)
    for name, module in model.named_modules():
        if isinstance(module, (DensityConstraint, L0Penalty)):
            expected = f"a model without it (prune the part of the model beside {name!r})"
            _checks.refuse("model", type(module).__name__, expected)
    budgets = _budgets(model, layers, target)
    kept = choose(layers, budgets)
    forced: dict[str, int] = {}
    collapsed: list[str] = []
    with torch.no_grad():
        for name, layer in layers.items():
            is_open = (layer.evaluation_gates() > 0).cpu()
            forced[name] = int((is_open & ~kept[name]).sum())
            if not bool((is_open & kept[name]).any()):
                collapsed.append(name)
    args = example_args(example_inputs)

    twin, wide, proof = _reference(model, args, kept)
    plan = make_plan(twin, layers, kept, wide, proof)
    del twin

    result = fold(closed(model, kept), plan.raw)
    for module in result.model.modules():
        module.__dict__.pop(TARGETS, None)
    for parameter in result.model.parameters():
        parameter.grad = None
    params, macs = count_params(model), count_macs(result.model, args)[""]
    small = apply(result.model, plan.edits, result.factors, plan.mends)
    changed = {edit.name for edit in plan.edits}
    sites = [
        _site(name, plan, layers.get(name), kept.get(name), forced.get(name, 0), name in collapsed)
        for name in plan.sites
        if name in layers or name in changed
    ]
    units = {"input": "in", "output": "out", "weight": "out", None: "out"}
    everything = tuple(layers)
    total = sum(layer.num_gates * layer.group_size for layer in layers.values())
    previous = getattr(model, "report", None)
    earlier = previous if isinstance(previous, dict) else {}
    small.report = {  # type: ignore[assignment]
        "format": REPORT_FORMAT,
        "architecture": "-".join(str(s[units[s["gates"]]][0]) for s in sites if s["gates"]),
        "density": spent(kept, layers, everything) / total,
        "forced": sum(forced.values()),
        "collapsed": collapsed,
        "groups": {
            one.name: {
                "layers": list(one.layers),
                "target": one.target,
                "density": spent(kept, layers, one.layers) / one.total,
                "kept": spent(kept, layers, one.layers),
                "limit": one.limit,
                "total": one.total,
                "forced": sum(forced[name] for name in one.layers),
            }
            for one in budgets
        },
        "params": [count_params(small), params],
        "macs": [count_macs(small, args)[""], macs],
        "sites": sites,
        "tier": plan.tier,
        "notes": plan.notes,
        "max_error": plan.error,
        "tolerance": proof.tolerance,
        "attributes": [*earlier.get("attributes", []), *(mend.as_json() for mend in plan.mends)],
        "layers": [*earlier.get("layers", []), *(edit.as_json() for edit in plan.edits)],
    }
    return small


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
        lines.append(
            f"{name}: density {group['density']:.4f} of at most {group['target']:g}, "
            f"{group['forced']} gates forced closed"
        )
    if report["collapsed"]:
        names = ", ".join(report["collapsed"])
        lines.append(f"collapsed: all gates of {names} are closed, nothing passes through")
    for what, key in (("parameters", "params"), ("MACs", "macs")):
        after, before = report[key]
        share = f" ({after / before:.2%})" if before else ""
        lines.append(f"{what}: {after:,} of {before:,}{share}")
    lines.append(f"architecture: {report['architecture']} ({report['tier']})")
    for mend in report["attributes"]:
        name = f"{mend['name']}.{mend['attribute']}".lstrip(".")
        lines.append(f"{name}: {mend['value'][0]} instead of {mend['value'][1]}")
    lines.append(f"largest error: {report['max_error']:.3g} (allowed {report['tolerance']:g})")
    lines.extend(report["notes"])
    return "\n".join(lines)
