"""Which gates stay: the most that the budgets allow, by rank of their open probability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.layers.gated import Gated
from l0fast.layers.handle import gate_owners, own_gates, sharing
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.layers.serving import alike, likeliest
from l0fast.measures.amounts import Asked
from l0fast.measures.measure import Measure


class Budget(NamedTuple):
    """A target that the kept gates must not exceed."""

    name: str
    layers: tuple[str, ...]
    target: float
    measure: Measure
    place: int = 0
    """Of its group among those of the measure."""
    factor: float = 1.0
    """What was found to be spent, over what the measure says."""
    asked: Asked | None = None
    """The target in the caller's words, where it was an amount."""

    def share(self, kept: Mapping[str, Tensor]) -> float:
        """What the kept gates cost, over what all cost."""
        spent = self.measure.spent(kept)[self.place]
        return spent * self.factor / self.measure.totals[self.place]

    def corrected(self, kept: Mapping[str, Tensor], spent: float) -> Budget:
        """The same where the kept gates turned out to cost that much."""
        reckoned = self.measure.spent(kept)[self.place]
        return self._replace(factor=max(self.factor, spent / reckoned))


def choose(
    layers: Mapping[str, Gated], budgets: list[Budget], round_to: int = 1, fill: bool = False
) -> dict[str, Tensor]:
    """The gates that stay, by layer: bool of log_alpha's shape, on the CPU.

    Gates on units stay and go in blocks of `round_to`, in the order of their open probability
    (the last block of a layer may be smaller); gates on single weights one by one. Every layer
    with gates on units keeps its first block. Then blocks that begin with a gate that is open in
    evaluation are kept in the order of that gate's open probability, as long as every budget
    holds; a layer is complete with its first block that does not fit, and makes room for the
    others'. Where layers share some of their gates, all this is about each part that the same
    layers have, not about a layer. With `fill` those that are closed in evaluation are kept as
    well where there is room, in the layers that a budget is about.

    Raises:
        ValueError: a budget does not hold the first block of its layers, or a log_alpha is NaN.
    """
    scores: list[Tensor] = []
    leaders: list[Tensor] = []
    first: list[Tensor] = []
    waits: list[Tensor] = []
    place = 0
    group: list[Tensor] = []
    number = 0
    owners = gate_owners(layers)  # shared gates stay and go together
    filled = {owners[name] for one in budgets for name in one.layers} if fill else set[str]()
    for name, readers in sharing(layers).items():
        layer = layers[name]
        log_alpha = layer.log_alpha.detach().double().cpu().flatten()
        if bool(log_alpha.isnan().any()):
            _checks.refuse("log_alpha", math.nan, f"numbers in every gate of {name!r}")
        units = layer.gates != "weight"
        size = round_to if units else 1
        places = torch.arange(len(log_alpha))
        leader, part = torch.empty_like(places), torch.empty_like(places)
        for same in alike(readers.values()):
            order = same[log_alpha[same].argsort(descending=True, stable=True)]
            leader[order] = order[torch.arange(len(order)) // size * size]
            part[same] = number
            number += 1
        begins = leader == places
        reserved = torch.zeros(len(places), dtype=torch.bool)
        if units:
            reserved = likeliest(readers.values(), log_alpha)
        with torch.no_grad():
            is_open = layer.evaluation_gates() > 0
        if name in filled:
            is_open.fill_(True)
        if isinstance(layer, GatedRMSNorm):  # its statistic takes no zeros for channels
            is_open[leader[~is_open.cpu()]] = False
        first.append(reserved)
        waits.append(is_open.cpu().flatten() & begins & ~reserved)
        leaders.append(leader + place)
        # Monotone in the open probability, and never rounded to 1.
        scores.append(log_alpha + layer.distribution.shift)
        group.append(part)
        place += len(places)
    sizes = [len(score) for score in scores]
    leader, part_of = torch.cat(leaders), torch.cat(group)
    kept = torch.cat(first)  # of each block, by the gate that it begins with

    def by_layer(blocks: Tensor) -> dict[str, Tensor]:
        parts = dict(zip(own_gates(layers), blocks[leader].split(sizes), strict=True))
        return {name: parts[of].view(layers[name].log_alpha.shape) for name, of in owners.items()}

    def fits(more: Tensor) -> bool:
        opened = by_layer(kept.index_fill(0, more, True))
        return all(one.share(opened) <= one.target for one in budgets)

    for one in budgets:
        least = one.share(by_layer(kept))
        if least > one.target:
            name = "target" if len(one.layers) == len(layers) else f"target[{one.name!r}]"
            units = "one unit" if round_to == 1 else f"{round_to} units"
            expected = f"a density of at least {least:.6g}, for {units} in each of {one.layers}"
            _checks.refuse(name, one.target if one.asked is None else one.asked, expected)
    waiting = torch.cat(waits).nonzero().flatten()
    waiting = waiting[torch.cat(scores)[waiting].argsort(descending=True, stable=True)]
    while len(waiting):
        # Costs do not fall when a gate opens, so what fits is a beginning of those that wait.
        taken, over = 0, len(waiting) + 1
        while taken + 1 < over:
            middle = (taken + over) // 2
            if fits(waiting[:middle]):
                taken = middle
            else:
                over = middle
        kept[waiting[:taken]] = True
        left = waiting[taken:]
        waiting = left[part_of[left] != part_of[left[:1]]]
    return by_layer(kept)
