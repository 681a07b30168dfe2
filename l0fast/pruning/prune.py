"""From a model with gates to a smaller ordinary one: choose, plan, apply, prove, report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast.constraints.budget import Budget, choose
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.penalty import L0Penalty
from l0fast.constraints.term import TARGETS
from l0fast.gating.attention import unfused_in
from l0fast.graph.calls import example_args, unwrapped
from l0fast.layers.draw import own_gates
from l0fast.layers.gated import Gated
from l0fast.measures.amounts import Asked, share
from l0fast.measures.counts import Counts, element_size, widths_left
from l0fast.measures.density import (
    WHOLE_MODEL,
    AnyMeasure,
    Group,
    measure_name,
    require_gated,
    target_groups,
)
from l0fast.measures.footprint import Footprint, measure_of
from l0fast.measures.latency import LatencyTable
from l0fast.measures.measure import GateMeasure, is_of_pruned
from l0fast.measures.stopwatch import whole_seconds
from l0fast.measures.timing import resolved
from l0fast.measures.trial import all_open, trial
from l0fast.pruning.report import REPORT_FORMAT, site_row
from l0fast.removal.compact import apply
from l0fast.removal.plan import closed, fold, make_plan, reference


def _left_targets(model: nn.Module, layers: Mapping[str, Gated]) -> dict[str, tuple[Group, Asked]]:
    """The targets that constraints left on the model and its parts."""
    found: dict[str, tuple[Group, Asked]] = {}
    for outer, module in model.named_modules():
        prefix = f"{outer}." if outer else ""
        for group, target in module.__dict__.get(TARGETS, {}).items():
            names = tuple(prefix + name for name in group.layers)
            whole = None if group.whole is None else outer
            for name in names:
                if name not in layers:
                    expected = (
                        f"a target: the model's constraint names {name!r}, which has no gates"
                    )
                    _checks.refuse("target", None, expected)
            everything = group.measure == "gates" and set(names) == set(layers)
            title = WHOLE_MODEL if everything or whole == "" else whole or ", ".join(names)
            if group.measure != "gates":
                title += f" ({measure_name(group.measure)})"
            while title in found:
                title += "'"
            measure = group.measure
            if isinstance(measure, LatencyTable):
                measure = measure.under(prefix)
            found[title] = Group(names, measure, whole), target
    return found


def _whole(value: float) -> float:
    """A count as an int; a cost that is none stays as it is."""
    return int(value) if float(value).is_integer() else value


def _at_first(model: nn.Module, dense: Counts) -> dict[str, int]:
    """What the dense model has, before any gate was removed during training."""
    report = getattr(model, "report", None)
    before = report.get("dense") if isinstance(report, dict) else None
    return before or dense.whole()


def prune(
    model: nn.Module,
    example_inputs: Any,
    target: Asked | Mapping[str, Asked] | None = None,
    *,
    measure: AnyMeasure = "gates",
    round_to: int = 1,
) -> nn.Module:
    """A smaller ordinary model that computes what the gated one does in evaluation.

    Equals, on any input:
        model.eval()(x)      # with the gates that do not fit the target closed

    The gates that stay are those open in evaluation, by rank of their open probability, as many
    as the targets allow (a layer is complete with its first gate that does not fit); every layer
    with gates on units keeps its likeliest one. Closed units
    are then removed wherever the layers around them agree, and elsewhere left out of the layer's
    computation by a gather before or a scatter after it. The result is compared with the gated
    model in float64 (where the model runs in it) on the example and on noise of its shape, and
    what does not hold is undone and named. The model passed in is not changed.

    Args:
        model: a model with gates.
        example_inputs: what its forward takes (a tuple for several arguments).
        target: the density that must not be exceeded: a number for the whole model, or layer
            name or glob pattern -> number. Default: the targets of the `DensityConstraint`s made
            for the model, each by its own measure; without any, every open gate stays.
        measure: what `target` is a share of, as in `DensityConstraint`.
        round_to: each layer with gates on units keeps a multiple of so many of them (or all it
            has), in the order of their open probability. A last block that is partly open is
            filled by the next likeliest gates, which are closed in evaluation and so add units of
            zeros, where the targets allow it, and else dropped. Where units have gates on both
            sides (a convolution's channels in front of a Linear's inputs) fewer may be left; the
            report names widths that are no multiples.

    Returns:
        A model of the same class, of plain PyTorch modules, in the same dtype, device and mode.
        Its attribute `report` is a dict (of what JSON knows):
            format: 1.
            architecture: units left along each gated layer's gated dimension, "198-233-100".
            density: parameters of kept gates / gated parameters.
            forced: how many gates the targets closed that were open in evaluation.
            collapsed: names of the gated layers without an open gate, through which nothing of
                the input passes (with gates on units, one unit of zeros stands for them).
            round_to: as asked; filled: how many gates stay that are closed in evaluation.
            groups: name -> {layers, measure, target, density, kept, total, forced}: each target,
                with what is kept of its measure, and of how much (empty without targets).
            params, macs, memory: [after, before]; before is the dense model without gates; MACs,
                and the memory of activations in bytes, are those of one forward of the example.
            latency: [after, before], measured now, in seconds for one forward of the example, if
                a target is one of latency (what that holds is the table's prediction), or None.
            sites: a dict for each gated layer, and for each other that changed: name, kind,
                gates ("input", "output", "weight" or None), gates_open, gates_total, forced,
                in and out ([kept, of]), status ("removed": closed units do not exist any more,
                "compacted": left out, with a gather or scatter; "kept": full size), reason.
            tier: how far layers could be merged; notes: what was undone, and why.
            max_error, tolerance: largest relative error found, and allowed.
            attention: the nn.MultiheadAttention modules that `sparsify_` made ordinary ones of two
                Linears, and how they are called, a list of dicts.
            attributes: attributes of modules that followed a size, such as num_heads, a list of
                dicts: name, kind (of the module), attribute, value ([after, before]).
            folded: names of the layers whose biases hold what constant inputs gave.
            layers: the recipe, a list of dicts in the order to apply: name, kind, in, out,
                inputs and outputs (the indices that stay, None for all), gather and scatter
                ([positions, of], None for none), scale ("input", "output" or None).

    Raises:
        ValueError: no gates, a target that leaves no unit for a layer, or an example that the
            model does not take.
        TypeError: a target of a wrong type.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (purged models).
    """
    _checks.whole("round_to", round_to)
    model = unwrapped(model)
    layers = require_gated(model)
    for name, module in model.named_modules():
        if isinstance(module, (DensityConstraint, L0Penalty)):
            expected = f"a model without it (prune the part of the model beside {name!r})"
            _checks.refuse("model", type(module).__name__, expected)
    if target is not None:
        measure = resolved(measure, model, example_inputs)
        asked = target_groups(model, target, measure)
    else:
        if measure != "gates":
            _checks.refuse("measure", measure_name(measure), "a target beside it")
        asked = _left_targets(model, layers)
    args = example_args(example_inputs)
    sized = any(is_of_pruned(group.measure) for group, _ in asked.values())
    tried = trial(model, args) if sized else None
    budgets: list[Budget] = []
    groups = {name: group for name, (group, _) in asked.items()}
    for name, (group, value) in asked.items():
        by = measure_of(layers, [group], tried)
        title = f"target[{name!r}]" if isinstance(target, Mapping) else "target"
        limit = share(title, value, measure_name(group.measure), by.totals[0])
        words_of = value if isinstance(value, str) else None
        budgets.append(Budget(name, group.layers, limit, by, asked=words_of))
    while True:
        kept = choose(layers, budgets, round_to)
        twin, wide, proof = reference(model, args, kept)
        plan = make_plan(twin, layers, kept, wide, proof)
        del twin
        result = fold(closed(model, kept), plan.raw)
        for module in result.model.modules():
            module.__dict__.pop(TARGETS, None)
        for parameter in result.model.parameters():
            parameter.grad = None
        size = element_size(model)
        dense = Counts.of(result.model, args, size, {})
        small = apply(result.model, plan.edits, result.factors, plan.mends, plan.constants)
        left = Counts.of(small, args, size, widths_left(plan))
        spent: dict[str, float] = {}
        for one in budgets:
            by = one.measure
            costs = by.left(left) if isinstance(by, Footprint) else by.spent(kept)
            spent[one.name] = costs[0]
        budgets = [one.corrected(kept, spent[one.name]) for one in budgets]
        if all(spent[one.name] / one.measure.totals[0] <= one.target for one in budgets):
            break
    before = _at_first(model, dense)
    owning = own_gates(layers)
    forced, filled = dict[str, int](), dict[str, int]()
    collapsed: list[str] = []
    with torch.no_grad():
        for name, layer in layers.items():
            is_open = (layer.evaluation_gates() > 0).cpu()
            forced[name] = int((is_open & ~kept[name]).sum())
            filled[name] = int((kept[name] & ~is_open).sum())
            if not bool((is_open & kept[name]).any()):
                collapsed.append(name)
    changed = {edit.name for edit in plan.edits}
    sites = [
        site_row(
            name, plan, layers.get(name), kept.get(name), forced.get(name, 0), name in collapsed
        )
        for name in plan.sites
        if name in layers or name in changed
    ]
    units = {"input": "in", "output": "out", "weight": "out"}
    gated = GateMeasure(layers, [Group(tuple(layers))])
    previous = getattr(model, "report", None)
    earlier = previous if isinstance(previous, dict) else {}
    small.report = {  # type: ignore[assignment]
        "format": REPORT_FORMAT,
        "architecture": "-".join(str(s[units[s["gates"]]][0]) for s in sites if s["gates"]),
        "density": gated.spent(kept)[0] / gated.totals[0],
        "forced": sum(forced[name] for name in owning),
        "collapsed": collapsed,
        "round_to": round_to,
        "filled": sum(filled[name] for name in owning),
        "groups": {
            one.name: {
                "layers": list(one.layers),
                "measure": measure_name(groups[one.name].measure),
                "target": one.target,
                "density": spent[one.name] / one.measure.totals[0],
                "kept": _whole(spent[one.name]),
                "total": _whole(one.measure.totals[0]),
                "forced": sum(
                    forced[name] for name in own_gates({name: layers[name] for name in one.layers})
                ),
            }
            for one in budgets
        },
        **{key: [after, before[key]] for key, after in left.whole().items()},
        "latency": whole_seconds([small, fold(all_open(model), plan.raw).model], args)
        if any(isinstance(group.measure, LatencyTable) for group in groups.values())
        else None,
        "sites": sites,
        "tier": plan.tier,
        "notes": plan.notes,
        "max_error": plan.error,
        "tolerance": proof.tolerance,
        "attention": [call.as_json() for call in unfused_in(model)],
        "attributes": [*earlier.get("attributes", []), *(mend.as_json() for mend in plan.mends)],
        "folded": sorted({*earlier.get("folded", []), *plan.constants}),
        "layers": [*earlier.get("layers", []), *(edit.as_json() for edit in plan.edits)],
    }
    return small
