"""From gates to edits: what each layer keeps, how that is carried out, and what is undone."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks, graph
from l0fast.compact import Edit, apply, layer_size, replace
from l0fast.draw import detach_draw, gated_layers
from l0fast.graph import LAYERS, Extent, Site, Trace
from l0fast.layers import Gated
from l0fast.proof import Proof, in_float64

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


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
    extents: dict[str, Extent]
    sites: dict[str, Site]
    error: float
    notes: list[str]
    """What was undone, and why."""
    raw: set[str]
    """Layers whose weights stay without their gates, see `fold`."""
    scaled: set[str]
    """Layers whose gates are a factor on their units: they do not get smaller by them."""
    trace: Trace | None
    """What the channels were followed in, and"""
    views: bool
    """whether across reshapes; None if each layer is planned by itself."""


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


def _light_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules may be replaced: it has the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Id of a parameter -> the names of all the modules that have it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and name not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(name)
    return owners


def fold(twin: nn.Module, raw: Collection[str] = ()) -> Folded:
    """Replaces the gated layers of `closed`'s copy by ordinary ones, in place.

    A tied weight stays as it is, and so does one that `raw` names: the gates go into a factor.
    """
    owners = _owners(twin)
    tied: dict[str, str] = {}
    for name, layer in twin.named_modules():
        for parameter in layer._parameters.values():
            others = [other for other in owners.get(id(parameter), []) if other != name]
            if others:
                tied[name] = " and ".join(repr(other) for other in others)
    factors: dict[str, Tensor] = {}
    replacements: dict[int, nn.Module] = {}
    detach_draw(twin)
    with torch.no_grad():
        for name, layer in gated_layers(twin).items():
            z = layer.evaluation_gates()
            dense = layer.folded(z)
            if name in raw or (name in tied and layer.gates != "weight"):
                dense.weight, dense.bias = layer.weight, layer.bias
                if layer.gates != "weight":
                    factors[name] = z.to(layer.weight.dtype)
            replacements[id(layer)] = dense
    return Folded(replace(twin, replacements), factors, tied)


def find_sites(
    folded: Folded,
    layers: Mapping[str, Gated],
    kept: Mapping[str, Tensor],
    trace: Trace | None,
    full: Mapping[str, str],
) -> dict[str, Site]:
    """Every Linear and convolution of the folded model, with what its gates leave.

    `full` names layers that must not get smaller, and says why.
    """
    sites: dict[str, Site] = {}
    for name, layer in folded.model.named_modules():
        if type(layer) not in LAYERS or layer._parameters.get("weight") is None:
            continue
        inputs, outputs = layer_size(layer)
        reads = torch.ones(inputs, dtype=torch.bool)
        writes = torch.ones(outputs, dtype=torch.bool)
        fixed, local = "", False
        if name in full:
            fixed = full[name]
        elif name in folded.tied:
            fixed = f"it shares its weight with {folded.tied[name]}"
            if name in layers and layers[name].gates == "weight":
                fixed = f"its gates make its own copy of the weight of {folded.tied[name]}"
        elif trace is not None and name in trace.read_outside:
            fixed = "its weight is also read outside of its own call"
        elif any(getattr(layer, hooks) for hooks in _HOOKS):
            fixed = "it has hooks"
        elif getattr(layer, "groups", 1) > 1:
            fixed = f"it has {layer.groups} groups"
        else:
            local = True
            calls = 1 if trace is None else trace.counts[name]
            fixed = "" if calls == 1 else f"it is called {calls} times"
        gated = layers.get(name)
        if gated is not None and name not in folded.factors:
            if gated.gates == "input":
                reads = kept[name]
            elif gated.gates == "output":
                writes = kept[name]
        sites[name] = Site(name, layer, reads, writes, fixed, local)
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

    Tried in turn: layers merged with their neighbours; merged, but not across reshapes; each
    layer by itself. Where even that fails, the layers at fault stay full, and again from the start.

    Raises:
        ValueError: not even the folded model computes what the gated one does.
    """
    notes: list[str] = []
    trace: Trace | None = None
    raw: set[str] = set()
    try:
        trace = graph.export(fold(_light_copy(twin)).model, args)
    except Exception as failure:
        notes.append(f"layers are not merged, torch.export refuses the model: {_raises(failure)}")
    else:
        raw = trace.read_outside & layers.keys()
    folded = fold(_light_copy(twin), raw)
    for name in raw:
        if trace is not None and not trace.counts[name]:
            folded.factors.pop(name, None)  # nothing was ever multiplied by its gates
    scales = {name: layers[name].gates for name in folded.factors}

    def attempt(edits: list[Edit]) -> tuple[float, str]:
        """The error of a plan, and "" if it holds or what is wrong with it."""
        try:
            candidate = apply(_light_copy(folded.model), edits, folded.factors)
            error = proof.error(candidate)
        except Exception as failure:
            return torch.inf, _raises(failure)
        return error, "" if error <= proof.tolerance else f"the output differs by {error:.3g}"

    fixed: dict[str, str] = {}
    while True:
        sites = find_sites(folded, layers, kept, trace, fixed)
        tiers: list[tuple[str, Trace | None, bool]] = []
        if trace is not None:
            tiers = [("merged", trace, True), ("merged except across reshapes", trace, False)]
        tiers.append(("each layer by itself", None, False))
        tried: list[list[Edit]] = []
        for tier, followed, views in tiers:
            if followed is None:
                extents = graph.local_extents(sites.values())
            else:
                extents = graph.extents(followed, sites.values(), views)
            pairs = ((site, extents[name]) for name, site in sites.items())
            edits = [edit_of(site, extent, scales.get(site.name)) for site, extent in pairs]
            tried.append([edit for edit in edits if edit is not None])
            if tried[-1] in tried[:-1]:
                continue
            error, failure = attempt(tried[-1])
            if not failure:
                return Plan(
                    tier=tier,
                    edits=tried[-1],
                    extents=extents,
                    sites=sites,
                    error=error,
                    notes=notes,
                    raw=raw,
                    scaled=set(scales),
                    trace=followed,
                    views=views,
                )
            _notes_once(notes, f"{tier}: undone, {failure}")

        base = [edit for edit in tried[-1] if edit.scale is not None]
        failure = attempt(base)[1]
        if failure:
            _checks.refuse(
                "model",
                f"{type(folded.model).__name__}, whose gates cannot be folded ({failure})",
                "a model that reads the weights of its layers only by calling them",
            )
        rest = [edit.name for edit in tried[-1] if edit.scale is None]
        alone = {edit.name: attempt([*base, edit])[1] for edit in tried[-1] if edit.name in rest}
        faults = {name: failure for name, failure in alone.items() if failure}
        for name in faults or rest:
            fixed[name] = f"made smaller: {alone[name] or 'it fails together with others'}"
