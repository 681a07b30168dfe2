"""The layers of a model as its gates leave them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from l0fast.graph.capture import Trace
from l0fast.graph.sites import Site, find_sites
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.pruning.draft import Draft
from l0fast.pruning.gate_values import GateValues


def _counting(site: Site) -> Site:
    """An RMS norm that counts no channel of zeros; if all are, one of them stands for them."""
    assert site.gate is not None
    opened = site.writes & (site.gate.cpu() > 0)
    counted = opened if bool(opened.any()) else site.writes
    return dataclasses.replace(site, reads=counted, writes=counted)


def gated_sites(
    draft: Draft, values: GateValues, trace: Trace | None, full: Mapping[str, str]
) -> dict[str, Site]:
    """The sites of a model, as its gates leave them; `full` as in `find_sites`."""
    layers, kept = values.layers, values.kept
    tied = {
        name: f"its gates make its own copy of the weight of {other}"
        if name in layers and layers[name].gates == "weight"
        else f"it shares its weight with {other}"
        for name, other in draft.tied.items()
    }
    sites = find_sites(draft.source, trace, tied, full)
    for name, layer in layers.items():
        if name not in sites:
            continue
        if name in draft.factors:
            sites[name] = dataclasses.replace(sites[name], folds=False)
        elif layer.gates == "input":
            sites[name] = dataclasses.replace(sites[name], reads=layer.spread(kept[name]))
        elif layer.gates == "output":
            gate = values.on_units(name, torch.float64)
            site = dataclasses.replace(sites[name], writes=kept[name], gate=gate)
            sites[name] = _counting(site) if isinstance(layer, GatedRMSNorm) else site
    return sites
