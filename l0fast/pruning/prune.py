"""From a model with gates to a smaller ordinary one: choose, plan, apply, prove, report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from l0fast import _checks, _warnings
from l0fast.graph.calls import Example, unwrapped
from l0fast.graph.sharding import on_full_weights
from l0fast.graph.structure import structure_of
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gates, handles_in, own_gates, refuse_adapters
from l0fast.measures.amounts import Asked, share
from l0fast.measures.counts import Counts, element_size
from l0fast.measures.footprint import Footprint
from l0fast.measures.groups import (
    WHOLE_MODEL,
    AnyMeasure,
    Asking,
    Group,
    measure_name,
    target_groups,
)
from l0fast.measures.latency import LatencyTable
from l0fast.measures.measure import is_of_pruned
from l0fast.measures.pick import measure_of
from l0fast.pruning.choose import Budget, choose
from l0fast.pruning.depth import by_old_names, copied_tensors, shallow
from l0fast.pruning.draft import new_draft, opened
from l0fast.pruning.gate_values import GateValues, all_gates
from l0fast.pruning.plan import make_plan
from l0fast.pruning.proof import Proof
from l0fast.pruning.report import attach_report
from l0fast.pruning.reporting import Facts, make_report
from l0fast.pruning.stopwatch import whole_seconds
from l0fast.pruning.timing import with_table
from l0fast.pruning.trial import known_dense, tried, widths_left

Targets = dict[str, tuple[Group, Asked]]


def _held(model: nn.Module, named: Asking | None) -> dict[Group, Asked] | None:
    """The targets of the constraints, on a model and its parts, that are alive.

    Args:
        model: with gates.
        named: only those of this constraint; None is returned where it is not one of them.
    """
    wanted = None if named is None else {id(part) for part in named.parts()}
    held: dict[Group, Asked] = {}
    found: set[int] = set()
    for outer, handle in handles_in(model).items():
        prefix = f"{outer}." if outer else ""
        for constraint in handle.constraints:
            if wanted is not None and id(constraint) not in wanted:
                continue
            found.add(id(constraint))
            for group, target in constraint.asked().values():
                names = tuple(prefix + name for name in group.layers)
                measure = group.measure
                if isinstance(measure, LatencyTable) and prefix:
                    measure = measure.under(prefix)
                whole = None if group.whole is None else outer
                held[Group(names, measure, whole)] = target
    return held if wanted is None or wanted <= found else None


def _named(model: nn.Module, layers: Mapping[str, Gated], target: Asking) -> dict[Group, Asked]:
    """The targets of one constraint, on the model, on a part of it, or on what it is a copy of."""
    held = _held(model, target)
    if held is not None:
        return held
    sizes = {name: layer.all_gates for name, layer in layers.items()}
    if any(sizes.get(name) != layer.all_gates for name, layer in target.layers.items()):
        _checks.refuse("target", type(target).__name__, "a constraint on this model")
    return dict(target.asked().values())


def _titled(held: Mapping[Group, Asked], layers: Mapping[str, Gated]) -> Targets:
    """The same by titles for reports and messages."""
    found: Targets = {}
    for group, target in held.items():
        for name in group.layers:
            if name not in layers:
                expected = f"a target: the model's constraint names {name!r}, which has no gates"
                _checks.refuse("target", None, expected)
        everything = group.measure == "gates" and set(group.layers) == set(layers)
        whole = group.whole
        title = WHOLE_MODEL if everything or whole == "" else whole or ", ".join(group.layers)
        if group.measure != "gates":
            title += f" ({measure_name(group.measure)})"
        while title in found:
            title += "'"
        found[title] = group, target
    return found


@dataclass(frozen=True, eq=False)
class _Request:
    """What must not be exceeded."""

    groups: Mapping[str, Group]
    budgets: list[Budget]


def _request(
    model: nn.Module,
    example_inputs: Any,
    target: Asked | Mapping[str, Asked] | Asking | None,
    measure: AnyMeasure,
) -> _Request:
    """The targets asked for, or those of the model's constraints, as budgets."""
    layers = gates(model).layers
    named = target is not None and not isinstance(target, Asking)
    if not named and measure != "gates":
        _checks.refuse("measure", measure_name(measure), "a target beside it")
    if target is None:
        asked = _titled(_held(model, None) or {}, layers)
    elif isinstance(target, Asking):
        asked = _titled(_named(model, layers, target), layers)
    else:
        asked = target_groups(layers, target, with_table(measure, model, example_inputs))
    sized = any(is_of_pruned(group.measure) for group, _ in asked.values())
    trial = tried(model, Example.of(example_inputs, model))[0] if sized else None
    budgets: list[Budget] = []
    for name, (group, value) in asked.items():
        by = measure_of(layers, [group], trial)
        title = f"target[{name!r}]" if isinstance(target, Mapping) else "target"
        limit = share(title, value, measure_name(group.measure), by.totals[0])
        words_of = value if isinstance(value, str) else None
        budgets.append(Budget(name, group.layers, limit, by, asked=words_of))
    return _Request({name: group for name, (group, _) in asked.items()}, budgets)


FORCED = 0.2
"""Share of the gates that are open in evaluation; if targets close more, there is a warning."""


def _warn_of_force(layers: Mapping[str, Gated], kept: Mapping[str, Tensor]) -> None:
    """Warns where the targets close much that the training left open."""
    opened = {name: layers[name].evaluation_gates() > 0 for name in own_gates(layers)}
    total = sum(int(gates.sum()) for gates in opened.values())
    closed = sum(int((gates & ~kept[n].to(gates.device)).sum()) for n, gates in opened.items())
    if closed > FORCED * total:
        _warnings.warn(
            f"prune: closes {closed} of the {total} gates that are open, to hold the target. The "
            "model was trained with these units, so it will be worse. Train to the end under the "
            "constraint, and do not prune a checkpoint from before the target was met"
        )


@on_full_weights
def prune(
    model: nn.Module,
    example_inputs: Any,
    target: Asked | Mapping[str, Asked] | Asking | None = None,
    *,
    measure: AnyMeasure = "gates",
    round_to: int = 1,
    uniform: bool | None = None,
) -> nn.Module:
    """Returns a smaller ordinary model that computes what the gated one does in evaluation.

    Equals, on any input:
        model.eval()(x)      # with the gates that do not fit the target closed

    The gates that are open in evaluation stay. If a target does not allow all of them, gates are
    taken in the order of their open probability, and a layer is complete at its first gate that
    does not fit. Every layer with gates on units keeps at least its likeliest one. Closed units are
    removed wherever the layers around them agree. Elsewhere a gather before the layer or a scatter
    after it leaves them out of the computation. The result is compared with the gated model, in
    float64 where the model runs in it. A removal that fails is undone, and the report names it. The
    comparison covers the output, and what is left of the output of every Linear and convolution. It
    runs on the example and on noise; where the model takes them, on another batch size and another
    length or image size, too. The model passed in is not changed.

    Args:
        model: a model with gates.
        example_inputs: what its forward takes: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments. A list or a NamedTuple is one argument.
        target: the density that must not be exceeded: a number for the whole model, or a dict of
            layer name or glob pattern -> number; or a constraint (or `Constraints`) on the model.
            Default: the targets of all constraints on the model that are alive, each by its own
            measure. Without a constraint, every open gate stays.
        measure: what `target` is a share of, as in `DensityConstraint`.
        round_to: each layer with gates on units keeps a multiple of this number of them, or all. If
            the last multiple is partly open, it is filled with the next likeliest gates where the
            targets allow it, and else dropped. (Those gates are closed, so their units are zeros.)
            Fewer may be left where units have gates on both sides, such as a convolution's channels
            in front of a Linear's inputs. The report names widths that are no multiples.
        uniform: whether layers that repeat, as in the blocks of a transformer, keep the same number
            of gates (heads, hidden units), so that a configuration can hold it as one number. Each
            keeps its likeliest gates. Gates of one rank stay or go in all layers, in the order of
            their mean. A layer with fewer open gates is filled with units of zeros. Default: as
            given to `sparsify_`.

    Returns:
        A model of the same class, of plain PyTorch modules, in the same dtype, device and mode
        (modules in `report.views` are torch.fx modules). Its attribute `report` is a `Report`. If
        the model has a `report` of its own, the attribute is `l0fast_report`.

    Raises:
        ValueError: no gates, a target that leaves no unit for a layer, an example that the model
            does not take, or a model that gives no finite number to compare.
        TypeError: a target of a wrong type.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (purged models).

    >>> x = torch.randn(2, 8)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> small = l0fast.prune(l0fast.sparsify_(model, example_inputs=x), x, 0.5, measure="params")
    >>> kept, before = small.report.params
    >>> kept <= 0.5 * before
    True
    """
    _checks.whole("round_to", round_to)
    if uniform is not None and not isinstance(uniform, bool):
        _checks.refuse("uniform", uniform, "True, False or None", TypeError)
    model = unwrapped(model)
    layers = gates(model).layers
    for name, module in model.named_modules():
        if isinstance(module, Asking):
            expected = f"a model without it (prune the part of the model beside {name!r})"
            _checks.refuse("model", type(module).__name__, expected)
    refuse_adapters("prune", model)
    request = _request(model, example_inputs, target, measure)
    example, budgets = Example.of(example_inputs, model), request.budgets
    size = element_size(model)
    structure = structure_of(model, example)
    dense = known_dense(model, structure)
    if dense is None:
        full = new_draft(model, GateValues(layers, all_gates(layers)), structure)
        dense = Counts.of(full.model, example, size, {})
    while True:
        in_step = gates(model).uniform if uniform is None else uniform
        kept = choose(layers, budgets, round_to, uniform=in_step)
        values = GateValues(layers, kept)
        stay = structure.added | copied_tensors(model, values)
        proof = Proof(model, values, example, structure.more_in_training, stay)
        found = shallow(model, values, structure, example, proof.check)
        draft = found.draft()
        plan = make_plan(draft, found.structure, proof.check)
        left = Counts.of(draft.model, example, size, widths_left(plan))
        if found.cut is not None:
            widths = {found.old(name): width for name, width in left.widths.items()}
            left = by_old_names(left, found.names, model, widths)
        spent: dict[str, float] = {}
        for one in budgets:
            by = one.measure
            costs = by.left(left) if isinstance(by, Footprint) else by.spent(kept)
            spent[one.name] = costs[0]
        before, budgets = budgets, [one.corrected(kept, spent[one.name]) for one in budgets]
        over = [one for one in budgets if spent[one.name] / one.measure.totals[0] > one.target]
        if not over:
            break
        if budgets == before:
            left_over = f"a larger target: no gates can close what is left in {over[0].name!r}"
            _checks.refuse("target", over[0].target, left_over)
    small = draft.finish()
    seconds: list[float] | None = None
    if any(isinstance(group.measure, LatencyTable) for group in request.groups.values()):
        seconds = whole_seconds([small, opened(model, structure.raw(layers))], example)
    asked = kept, request.groups, budgets, spent, round_to
    facts = Facts(*asked, proof.tolerance, proof.compared, seconds, found)
    attach_report(small, make_report(model, plan, facts, dense, left))
    _warn_of_force(layers, kept)
    return small
