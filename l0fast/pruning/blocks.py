"""The blocks in which gates stay or go: of one layer, or of several layers in step."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.layers.gated import Gated
from l0fast.layers.handle import sharing
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.layers.serving import ON_UNITS, alike, likeliest


@dataclass(frozen=True, eq=False)
class Blocks:
    """The gates of a model, one log_alpha after another; each tensor has a number for each gate.

    A block is named by one of its gates, its leader.
    """

    leader: Tensor
    score: Tensor
    """Monotone in the open probability."""
    first: Tensor
    """bool, of leaders: blocks that stay in any case."""
    waits: Tensor
    """bool, of leaders: blocks that stay where there is room."""
    part: Tensor
    """Gates that one readership has: a part is complete with its first block that does not fit."""
    starts: Mapping[str, int]
    """First layer that has a log_alpha -> where its gates begin."""

    @classmethod
    def of(cls, layers: Mapping[str, Gated], round_to: int, filled: Collection[str]) -> Blocks:
        """Each layer by itself.

        Args:
            layers: with gates.
            round_to: how many gates on units a block has.
            filled: layers whose closed gates may stay, too.

        Raises:
            ValueError: a log_alpha is NaN.
        """
        found: list[tuple[Tensor, ...]] = []
        starts: dict[str, int] = {}
        place = number = 0
        for name, readers in sharing(layers).items():
            layer = layers[name]
            log_alpha = layer.log_alpha.detach().double().cpu().flatten()
            if bool(log_alpha.isnan().any()):
                _checks.refuse("log_alpha", math.nan, f"numbers in every gate of {name!r}")
            units = layer.gates != "weight"
            size = _size(layer, round_to)
            places = torch.arange(len(log_alpha))
            leader, part = torch.empty_like(places), torch.empty_like(places)
            for same in alike(readers.values()):
                order = same[log_alpha[same].argsort(descending=True, stable=True)]
                leader[order] = order[torch.arange(len(order)) // size * size]
                part[same] = number
                number += 1
            first = torch.zeros(len(places), dtype=torch.bool)
            if units:
                first = likeliest(readers.values(), log_alpha)
                first[leader[first]] = True
            with torch.no_grad():
                is_open = (layer.evaluation_gates() > 0).cpu().flatten()
            if name in filled:
                is_open.fill_(True)
            if isinstance(layer, GatedRMSNorm):  # its statistic takes no zeros for channels
                is_open[leader[~is_open]] = False
            waits = is_open & (leader == places) & ~first
            # Never rounded to 1.
            score = log_alpha + layer.distribution.shift
            found.append((leader + place, score, first, waits, part))
            starts[name] = place
            place += len(places)
        leaders, score, first, waits, part = map(torch.cat, zip(*found, strict=True))
        return cls(leaders, score, first, waits, part, starts)

    def in_step(self, layers: Mapping[str, Gated], round_to: int) -> Blocks:
        """The same with as many gates of each of the layers that repeat.

        A block is then those of the same rank in each of the layers; its score is their mean, and
        it waits if any of them does; of experts, if all do. Gates of layers that share only some of
        theirs stay by layer.
        """
        leader, score, waits = self.leader.clone(), self.score.clone(), self.waits.clone()
        for names in repeating(layers):
            size = layers[names[0]].log_alpha.numel()
            own = torch.tensor([self.starts[name] for name in names])[:, None] + torch.arange(size)
            ranked = own.gather(1, self.score[own].argsort(dim=1, descending=True, stable=True))
            block = _size(layers[names[0]], round_to)
            begins = torch.arange(size) // block * block
            leader[ranked] = ranked[0, begins]
            score[ranked[0]] = self.score[ranked].mean(0)
            waits[ranked] = False
            heads = begins.unique()
            waiting = self.waits[ranked[:, heads]]
            # A router would pick an expert of zeros.
            of_experts = layers[names[0]].gates == "expert"
            waits[ranked[0, heads]] = waiting.all(0) if of_experts else waiting.any(0)
        first = self.first & (leader == torch.arange(len(leader)))
        return Blocks(leader, score, first, waits, self.part, self.starts)


def _size(layer: Gated, round_to: int) -> int:
    """How many gates a block of a layer has."""
    return round_to if layer.gates in ON_UNITS else 1


def repeating(layers: Mapping[str, Gated]) -> list[list[str]]:
    """Layers with as many gates on units whose names differ in numbers alone, as those of the
    blocks of a stack do; each has gates of its own, or shares all of them."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, readers in sharing(layers).items():
        layer = layers[name]
        whole = all(reader.gate_index is None for reader in readers.values())
        if layer.gates in ("weight", "branch") or not whole:
            continue
        role = re.sub(r"(?<![^.])\d+(?![^.])", "#", name)
        key = role, layer.gates, layer.units, layer.log_alpha.numel()
        found.setdefault(key, []).append(name)
    return [names for names in found.values() if len(names) > 1]
