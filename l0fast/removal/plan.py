"""From gates to edits: what each layer keeps, how that is carried out, and what is undone."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.graph import capture
from l0fast.graph.capture import Trace, layer_size
from l0fast.graph.liveness import Extent, Liveness, local_extents
from l0fast.graph.proof import Proof, in_float64
from l0fast.graph.sites import Site, find_sites, light_copy, replace, tied_modules
from l0fast.graph.walk import Walk
from l0fast.layers.draw import detach_draw, gated_layers
from l0fast.layers.gated import Gated
from l0fast.removal.compact import Edit, Mend, apply
from l0fast.removal.mend import merged_tiers
from l0fast.skipping.following import stop_following

ALONE = "each layer by itself"


@dataclass
class Folded:
    """A plain model of full size, with the gates in its weights."""

    model: nn.Module
    factors: dict[str, Tensor]
    """Gates that no weight holds, since the weight is tied: the layer needs a scale."""
    tied: dict[str, str]
    """Layer -> what it shares a parameter with."""


@dataclass
class Plan:
    """What was carried out, and proven."""

    tier: str
    edits: list[Edit]
    mends: list[Mend]
    extents: dict[str, Extent]
    sites: dict[str, Site]
    error: float
    notes: list[str]
    """What was undone, and why."""
    raw: set[str]
    """Layers whose weights stay without their gates, see `fold`."""
    scaled: set[str]
    """Layers whose gates are a factor on their units: they do not get smaller by them."""
    constants: dict[str, Tensor]
    """Layer -> what goes into its bias, see `compact.edited`; where anything does."""
    live: Liveness | None
    """What the extents come from; None if each layer is planned by itself."""
    rigid: list[str]
    """Modules in whose forward sizes are written out, see `Liveness.extents`."""


def closed(model: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a gated model in which only the gates of `kept` can be open."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in gated_layers(twin).items():
            layer.log_alpha[~kept[name].to(layer.log_alpha.device)] = -torch.inf
    return twin


def reference(
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


def fold(twin: nn.Module, raw: Collection[str] = ()) -> Folded:
    """Replaces the gated layers of `closed`'s copy by ordinary ones, in place.

    A tied weight stays as it is, and so does one that `raw` names: the gates go into a factor.
    """
    tied = tied_modules(twin)
    factors: dict[str, Tensor] = {}
    replacements: dict[int, nn.Module] = {}
    detach_draw(twin)
    stop_following(twin)
    with torch.no_grad():
        for name, layer in gated_layers(twin).items():
            z = layer.evaluation_gates()
            dense = layer.folded(z)
            if name in raw or (name in tied and layer.gates != "weight"):
                dense.weight, dense.bias = layer.weight, layer.bias
                if layer.gates != "weight":
                    factors[name] = layer.spread(z.to(layer.weight.dtype))
            replacements[id(layer)] = dense
    return Folded(replace(twin, replacements), factors, tied)


def gated_sites(
    folded: Folded,
    layers: Mapping[str, Gated],
    kept: Mapping[str, Tensor],
    trace: Trace | None,
    full: Mapping[str, str],
) -> dict[str, Site]:
    """The sites of the folded model, as its gates leave them; `full` as in `find_sites`."""
    tied = {
        name: f"its gates make its own copy of the weight of {other}"
        if name in layers and layers[name].gates == "weight"
        else f"it shares its weight with {other}"
        for name, other in folded.tied.items()
    }
    sites = find_sites(folded.model, trace, tied, full)
    for name, layer in layers.items():
        if name not in sites:
            continue
        if name in folded.factors:
            sites[name] = dataclasses.replace(sites[name], folds=False)
            continue
        if layer.gates == "input":
            sites[name] = dataclasses.replace(sites[name], reads=layer.spread(kept[name]))
        elif layer.gates == "output":
            sites[name] = dataclasses.replace(sites[name], writes=kept[name])
    return sites


def edit_of(site: Site, extent: Extent, scale: str | None = None) -> Edit | None:
    """The edit that gives a layer its extent, or None if nothing changes."""

    def part(mask: Tensor) -> tuple[int, ...] | None:
        return None if bool(mask.all()) else tuple(mask.nonzero().flatten().tolist())

    def move(inner: Tensor, outer: Tensor) -> tuple[tuple[int, ...], int] | None:
        positions = part(inner[outer])
        return None if positions is None else (positions, int(outer.sum()))

    edit = Edit(
        site.name,
        type(site.layer).__name__,
        layer_size(site.layer),
        part(extent.columns),
        part(extent.rows),
        move(extent.columns, extent.arrives),
        move(extent.rows, extent.leaves),
        scale,
    )
    plain = (edit.inputs, edit.outputs, edit.gather, edit.scatter, edit.scale)
    return None if all(value is None for value in plain) else edit


def constants_of(extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """What goes into the biases of layers, where anything does."""
    found = {name: extent.constants for name, extent in extents.items()}
    return {name: c for name, c in found.items() if c is not None and bool(c.any())}


def _raises(failure: Exception) -> str:
    lines = str(failure).strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[0][:200]}"


def _notes_once(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


def make_plan(
    twin: nn.Module,
    layers: Mapping[str, Gated],
    kept: Mapping[str, Tensor],
    args: tuple[Any, ...],
    proof: Proof,
) -> Plan:
    """The furthest-reaching plan that is proven equal on the example.

    Tried in turn: layers merged with their neighbours; merged, with the shapes kept in modules
    where a size is written out that no attribute mends; with the shapes kept in all; each layer by
    itself. Where even that fails, the layers at fault stay full, and again from the start.

    Raises:
        ValueError: not even the folded model computes what the gated one does.
    """
    notes: list[str] = []
    trace: Trace | None = None
    raw: set[str] = set()
    try:
        trace = capture.export(fold(light_copy(twin)).model, args)
    except Exception as failure:
        notes.append(f"layers are not merged, torch.export refuses the model: {_raises(failure)}")
    else:
        raw = trace.read_outside & layers.keys()
    folded = fold(light_copy(twin), raw)
    for name in raw:
        if trace is not None and not trace.counts[name]:
            folded.factors.pop(name, None)  # nothing was ever multiplied by its gates
    scales = {name: layers[name].gates for name in folded.factors}

    def attempt(
        edits: list[Edit],
        mends: Collection[Mend] = (),
        constants: Mapping[str, Tensor] | None = None,
    ) -> tuple[float, str]:
        """The error of a plan, and "" if it holds or what is wrong with it."""
        try:
            candidate = light_copy(folded.model)
            candidate = apply(candidate, edits, folded.factors, mends, constants)
            error = proof.error(candidate)
        except Exception as failure:
            return torch.inf, _raises(failure)
        return error, "" if error <= proof.tolerance else f"the output differs by {error:.3g}"

    fixed: dict[str, str] = {}
    while True:
        sites = gated_sites(folded, layers, kept, trace, fixed)

        def edits_of(
            extents: Mapping[str, Extent], sites: Mapping[str, Site] = sites
        ) -> list[Edit]:
            pairs = ((site, extents[name]) for name, site in sites.items())
            edits = [edit_of(site, extent, scales.get(site.name)) for site, extent in pairs]
            return [edit for edit in edits if edit is not None]

        alone = local_extents(sites.values())
        live: Liveness | None = None
        tiers: Iterable[tuple[str, list[str], list[Mend]]] = []
        if trace is not None:
            live = Liveness(Walk(trace, sites.values()))
            tiers = merged_tiers(
                folded.model,
                live,
                lambda extents, mends: attempt(edits_of(extents), mends, constants_of(extents))[1],
            )
        tried: list[tuple[list[Edit], list[Mend]]] = []
        undone: dict[str, str] = {}
        for tier, rigid, mends in chain(tiers, [(ALONE, [], [])]):
            if tier == ALONE:
                live = None
            extents = alone if live is None else live.extents(rigid)
            edits = edits_of(extents)
            if (edits, mends) in tried:
                continue
            tried.append((edits, mends))
            error, failure = attempt(edits, mends, constants_of(extents))
            if not failure:
                undone.pop(tier, None)
                notes += [f"{other}: undone, {failure}" for other, failure in undone.items()]
                return Plan(
                    tier=tier,
                    edits=edits,
                    mends=mends,
                    extents=extents,
                    sites=sites,
                    error=error,
                    notes=notes,
                    raw=raw,
                    scaled=set(scales),
                    constants=constants_of(extents),
                    live=live,
                    rigid=rigid,
                )
            undone.setdefault(tier, failure)
        for tier, failure in undone.items():
            _notes_once(notes, f"{tier}: undone, {failure}")

        edits = edits_of(alone)
        base = [edit for edit in edits if edit.scale is not None]
        failure = attempt(base)[1]
        if failure:
            _checks.refuse(
                "model",
                f"{type(folded.model).__name__}, whose gates cannot be folded ({failure})",
                "a model that reads the weights of its layers only by calling them",
            )
        rest = [edit.name for edit in edits if edit.scale is None]
        each = {edit.name: attempt([*base, edit])[1] for edit in edits if edit.name in rest}
        faults = {name: failure for name, failure in each.items() if failure}
        for name in faults or rest:
            fixed[name] = f"made smaller: {each[name] or 'it fails together with others'}"
