"""A trial of pruning: what closed gates leave of a model, before any gate is closed in earnest."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.capture import layer_size
from l0fast.layers.draw import gate_owners, gated_layers
from l0fast.measures.counts import Counts, element_size, widths_left
from l0fast.removal.compact import apply
from l0fast.removal.plan import Plan, fold, make_plan, reference


@dataclass(frozen=True)
class Trial:
    """How `prune` carried out some closed gates, and what was left."""

    plan: Plan
    kept: dict[str, Tensor]
    """Layer -> bool, of log_alpha's shape: the gates that were open."""
    dense: Counts
    """With every gate open."""
    left: Counts
    element_size: int
    """Bytes of one of the model's own numbers."""

    @property
    def shrinking(self) -> list[str]:
        """The layers that closed gates can make smaller."""
        plan = self.plan
        return [
            name
            for name, site in plan.sites.items()
            if site.local or (plan.live is not None and not site.fixed)
        ]


def all_open(model: nn.Module) -> nn.Module:
    """A copy of a gated model with every gate open."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in gated_layers(twin).values():
            layer.log_alpha.fill_(layer.distribution.bound)
    return twin


def trial(model: nn.Module, args: tuple[Any, ...]) -> Trial:
    """Prunes with about half of the units closed."""
    twin = all_open(model)
    kept: dict[str, Tensor] = {}
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in gated_layers(twin).items():
            kept[name] = torch.ones(layer.log_alpha.shape, dtype=torch.bool)
            if layer.gates != "weight":
                closed = torch.randperm(layer.num_gates, generator=chance)[layer.num_gates // 2 :]
                kept[name][closed[: layer.num_gates - 1]] = False
    kept = {name: kept[owner] for name, owner in gate_owners(gated_layers(twin)).items()}
    twin, wide, proof = reference(twin, args, kept)
    plan = make_plan(twin, gated_layers(twin), kept, wide, proof)
    folded = fold(twin, plan.raw)
    size = element_size(model)
    full = {name: layer_size(site.layer) for name, site in plan.sites.items()}
    dense = Counts.of(folded.model, wide, size, full)
    small = apply(folded.model, plan.edits, folded.factors, plan.mends)
    left = Counts.of(small, wide, size, widths_left(plan))
    return Trial(plan, kept, dense, left, size)
