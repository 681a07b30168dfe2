"""What `prune` says of its result: a row for each layer, and the whole as a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import SimpleNamespace
from typing import Any

from torch import nn

from l0fast import _checks
from l0fast._tables import aligned
from l0fast.layers.handle import handle_of
from l0fast.measures.amounts import words

REPORT_FORMAT = 1


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What `prune` has done. `print` shows it as a table.

    All values can be written as JSON. Pairs of numbers are [after, before].

    Attributes:
        format: 1.
        architecture: units left along each gated layer's gated dimension, "198-233-100".
        density: parameters of kept gates over gated parameters.
        forced: how many gates were open in evaluation and were closed to hold the targets.
        collapsed: names of the gated layers without an open gate. Nothing of the input passes
            through them; with gates on units, one unit of zeros stands for them.
        round_to: as asked.
        filled: how many gates are closed in evaluation and stay.
        groups: name of a target -> a dict: layers, measure, target, density, kept, total, forced.
            Empty without targets.
        params: parameters, [after, before]; before is the dense model without gates.
        macs: multiply-accumulates of one forward of the example, [after, before].
        memory: bytes of activations of one forward of the example, [after, before].
        latency: measured seconds for one forward of the example, [after, before], where a target
            is one of latency, else None. The target holds the prediction of its table.
        sites: a dict for each gated layer, and for each other layer that changed: name, kind,
            gates ("input", "output", "weight" or None), gates_open, gates_total, forced, in and
            out ([kept, of]), status and reason. A status is "removed" (closed units do not exist
            any more), "compacted" (left out, with a gather or scatter) or "kept" (full size).
        tier: how far layers could be merged; "merged" if no gather or scatter is left.
        notes: what was undone, and why.
        max_error: the largest relative error found.
        tolerance: the largest that is allowed.
        compared: what the models were compared on, in words.
        attention: a dict for each nn.MultiheadAttention that `sparsify_` made an ordinary one of
            two Linears: how it is called.
        attributes: a dict for each attribute of a module that followed a size, such as num_heads:
            name, kind (of the module), attribute, value ([after, before]).
        views: a dict for each module that torch.fx has rebuilt with new sizes in its views, since
            no attribute holds these sizes: name, kind (its former class), constants and lengths (of
            arguments of its forward), views (node -> sizes). The rebuilt module does not have the
            attributes of its class, such as num_heads.
        folded: names of the layers whose biases hold what constant inputs gave.
        cuts: a dict for each time that branches or experts were cut out: branches (names of their
            last layers), modules (what took the place of what), dropped (list of modules -> places
            that were taken out of it; later modules have new names, which the report uses), after
            (how many entries of layers, attributes and views came before); and experts, if
            mixtures lost some: name, router, experts, kept (the places of those that stay), ...
        layers: the recipe, a list of dicts in the order to apply: name, kind, in, out, inputs and
            outputs (the indices that stay, None for all), gather and scatter ([positions, of],
            None for none), scale ("input", "output" or None).
    """

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
    compared: list[str] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    cuts: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        """A table, one line a layer, and lines about the whole model."""
        return _as_text(self)

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        return asdict(self)

    def __eq__(self, other: object) -> bool:
        names = [one.name for one in fields(self)]
        return all(hasattr(other, n) and getattr(self, n) == getattr(other, n) for n in names)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kept, before = self.params
        return f"<Report of {self.architecture}: {kept:,} of {before:,} parameters>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Report:
        return self  # frozen

    def __reduce__(self) -> Any:
        # A pruned model is pickled, and loaded where there is no l0fast.
        return SimpleNamespace, (), vars(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Report:
        """The report of such a dict.

        Raises:
            TypeError: it is none.
        """
        made = cls(**entry)
        for one in fields(cls):
            value = getattr(made, one.name)
            kinds = {kind.partition("[")[0] for kind in str(one.type).split(" | ")}
            if ("None" if value is None else type(value).__name__) not in kinds:
                raise TypeError(f"{one.name} is a {type(value).__name__}")
        return made


@dataclass(frozen=True)
class Recipe:
    """How a model became smaller before, and what it was at first."""

    dense: dict[str, int] | None = None
    """Measure -> what the dense model had; None where nothing was removed in training."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    attributes: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    cuts: list[dict[str, Any]] = field(default_factory=list)


_FIELDS = {one.name for one in fields(Report)}
_OURS, _BESIDE = "report", "l0fast_report"
"""Attribute of a pruned model that holds its report, and that where it has one of its own."""


def report_of(model: nn.Module) -> Report | None:
    """The report that `prune` left on a model, if it did."""
    for name in (_OURS, _BESIDE):
        found = vars(model).get(name)
        if isinstance(found, SimpleNamespace) and vars(found).keys() == _FIELDS:  # unpickled
            return Report(**vars(found))
        if isinstance(found, Report):
            return found
    return None


def required_report(small: nn.Module) -> Report:
    """The same, of a model that must have one.

    Raises:
        ValueError: it has none.
    """
    report = report_of(small) if isinstance(small, nn.Module) else None
    if report is None:
        _checks.refuse("small", type(small).__name__, "a model that prune returned")
    return report


def attach_report(model: nn.Module, report: Report) -> None:
    """Leaves a report on a model, beside an attribute of the user's that has its name."""
    earlier = report_of(model) is not None and _BESIDE not in vars(model)
    setattr(model, _BESIDE if hasattr(model, _OURS) and not earlier else _OURS, report)


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


def _as_text(report: Report) -> str:
    """A table, one line a layer, and lines about the whole model."""
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
    for cut in report.cuts:
        if cut["branches"]:
            lines.append(f"removed branches, by their last layers: {', '.join(cut['branches'])}")
        for one in cut.get("experts", []):
            name = f"{one['name']}.{one['experts']}".strip(".") or "the model"
            lines.append(f"experts left in {name!r}: {len(one['kept'])} of {one['number']}")
        lines += [f"taken out of {name!r}: {places}" for name, places in cut["dropped"].items()]
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
        lines.append(f"widths in multiples of {size} ({report.filled} gates filled up){but}")
    lines.append(f"architecture: {report.architecture} ({report.tier})")
    for patch in report.attributes:
        name = f"{patch['name']}.{patch['attribute']}".lstrip(".")
        lines.append(f"{name}: {patch['value'][0]} instead of {patch['value'][1]}")
    for patch in report.views:
        lines.append(f"{patch['name']}: made anew by torch.fx, for the sizes in its views")
    lines.append(f"largest error: {report.max_error:.3g} (allowed {report.tolerance:g})")
    lines.append(f"compared on: {'; '.join(report.compared)}")
    lines.extend(report.notes)
    return "\n".join(lines)
