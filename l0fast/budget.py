"""Which gates stay: the most that the budgets allow, by rank of their open probability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.density import gated_parameters
from l0fast.layers import Gated


class Budget(NamedTuple):
    """Parameters that the gates of some layers may keep."""

    name: str
    layers: tuple[str, ...]
    target: float
    total: int
    """Parameters that the gates of these layers control."""
    limit: int
    """The most of them that may stay."""


def most_within(target: float, total: int) -> int:
    """The largest whole number whose share of `total` is, as a float, at most `target`.

    target * total in floats would be off by one either way: 0.29 * 100 < 29, 0.1 * 30 > 3.
    """
    limit = math.floor(Fraction(repr(target)) * total)
    while limit < total and (limit + 1) / total <= target:
        limit += 1
    return limit


def budget(name: str, names: tuple[str, ...], target: float, layers: Mapping[str, Gated]) -> Budget:
    """The budget of a density target over some layers."""
    total = gated_parameters([layers[layer] for layer in names])
    return Budget(name, names, target, total, most_within(float(target), total))


def spent(kept: Mapping[str, Tensor], layers: Mapping[str, Gated], names: tuple[str, ...]) -> int:
    """Parameters of the kept gates of some layers."""
    return sum(int(kept[name].sum()) * layers[name].group_size for name in names)


def choose(layers: Mapping[str, Gated], budgets: list[Budget]) -> dict[str, Tensor]:
    """The gates that stay, by layer: bool of log_alpha's shape, on the CPU.

    Every layer with gates on units keeps its likeliest unit. Then gates that are open in
    evaluation are kept in the order of their open probability, as long as every budget holds; one
    that does not fit makes room for later ones that do.

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
    counts = torch.tensor(sizes)
    cost = torch.tensor([layer.group_size for layer in layers.values()]).repeat_interleave(counts)
    belongs = torch.zeros(len(budgets), len(layers), dtype=torch.bool)
    for row, one in enumerate(budgets):
        belongs[row] = torch.tensor([name in one.layers for name in layers])
    member = belongs.repeat_interleave(counts, dim=1)
    kept = torch.cat(reserved)
    left: list[int] = []
    for row, one in enumerate(budgets):
        left.append(one.limit - int(cost[kept & member[row]].sum()))
        if left[row] < 0:
            name = "target" if len(one.layers) == len(layers) else f"target[{one.name!r}]"
            least = (one.limit - left[row]) / one.total
            expected = f"a density of at least {least:.6g}, for one unit in each of {one.layers}"
            _checks.refuse(name, one.target, expected)

    waiting = torch.cat(candidates).nonzero().flatten()
    waiting = waiting[torch.cat(scores)[waiting].argsort(descending=True, stable=True)]
    while len(waiting):
        fits = torch.ones(len(waiting), dtype=torch.bool)
        for row in range(len(budgets)):
            fits &= ~member[row, waiting] | (cost[waiting] <= left[row])
        waiting = waiting[fits]
        over = torch.zeros(len(waiting), dtype=torch.bool)
        for row in range(len(budgets)):
            over |= (cost[waiting] * member[row, waiting]).cumsum(0) > left[row]
        stop = int(over.nonzero()[0]) if bool(over.any()) else len(waiting)
        taken, waiting = waiting[:stop], waiting[stop:]
        kept[taken] = True
        for row in range(len(budgets)):
            left[row] -= int(cost[taken][member[row, taken]].sum())
    shapes = (layer.log_alpha.shape for layer in layers.values())
    return {
        name: part.view(shape)
        for name, part, shape in zip(layers, kept.split(sizes), shapes, strict=True)
    }
