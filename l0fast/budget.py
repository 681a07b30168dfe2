"""Which gates stay: the most that the budgets allow, by rank of their open probability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.layers import Gated
from l0fast.measure import Measure


class Budget(NamedTuple):
    """A target that the kept gates must not exceed."""

    name: str
    layers: tuple[str, ...]
    target: float
    measure: Measure
    """Of one group."""

    def spent(self, kept: Mapping[str, Tensor]) -> float:
        """What the kept gates cost."""
        return self.measure.spent(kept)[0]

    def share(self, kept: Mapping[str, Tensor]) -> float:
        """The same over what all gates cost."""
        return self.spent(kept) / self.measure.totals[0]


def choose(layers: Mapping[str, Gated], budgets: list[Budget]) -> dict[str, Tensor]:
    """The gates that stay, by layer: bool of log_alpha's shape, on the CPU.

    Every layer with gates on units keeps its likeliest unit. Then gates that are open in
    evaluation are kept in the order of their open probability, as long as every budget holds; a
    layer is complete with its first gate that does not fit, and makes room for the others'.

    Raises:
        ValueError: a budget does not hold one unit for each of its layers, or a log_alpha is NaN.
    """
    scores: list[Tensor] = []
    candidates: list[Tensor] = []
    reserved: list[Tensor] = []
    for name, layer in layers.items():
        log_alpha = layer.log_alpha.detach().double().cpu().flatten()
        if bool(log_alpha.isnan().any()):
            _checks.refuse("log_alpha", math.nan, f"numbers in every gate of {name!r}")
        best = torch.zeros(len(log_alpha), dtype=torch.bool)
        if layer.gates != "weight" and len(log_alpha):
            best[log_alpha.argmax()] = True
        reserved.append(best)
        with torch.no_grad():
            is_open = layer.evaluation_gates() > 0
        candidates.append(is_open.cpu().flatten() & ~best)
        # Monotone in the open probability, and never rounded to 1.
        scores.append(log_alpha + layer.distribution.shift)
    sizes = [len(score) for score in scores]
    shapes = [layer.log_alpha.shape for layer in layers.values()]
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    kept = torch.cat(reserved)

    def by_layer(flat: Tensor) -> dict[str, Tensor]:
        parts = zip(layers, flat.split(sizes), shapes, strict=True)
        return {name: part.view(shape) for name, part, shape in parts}

    def fits(more: Tensor) -> bool:
        opened = by_layer(kept.index_fill(0, more, True))
        return all(one.share(opened) <= one.target for one in budgets)

    for one in budgets:
        least = one.share(by_layer(kept))
        if least > one.target:
            name = "target" if len(one.layers) == len(layers) else f"target[{one.name!r}]"
            expected = f"a density of at least {least:.6g}, for one unit in each of {one.layers}"
            _checks.refuse(name, one.target, expected)
    waiting = torch.cat(candidates).nonzero().flatten()
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
        waiting = left[owner[left] != owner[left[:1]]]
    return by_layer(kept)
