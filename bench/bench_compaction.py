"""compaction: the order of every layer's units, in one launch and without asking the device."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Effort, rotating
from l0fast import functional

SETS = 4
SIZES = {"mlp": (784, 300, 100), "ffn": (16384,) * 8}
"""Model -> the units of its gated layers."""
OPEN = 0.3


def by_nonzero(alive: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor, int]]:
    """(index, place, count) of each layer, in plain PyTorch: the host waits for a count."""
    orders: list[tuple[Tensor, Tensor, int]] = []
    for part in alive.split(sizes):
        opened = part.nonzero().flatten()
        index = torch.cat([opened, (~part).nonzero().flatten().flip(0)])
        place = torch.empty_like(index)
        place[index] = torch.arange(len(part), device=part.device)
        orders.append((index, place, len(opened)))
    return orders


def _run(name: str, sizes: tuple[int, ...], device: str, effort: Effort) -> list[Row]:
    masks = [(torch.rand(sum(sizes), device=device) < OPEN,) for _ in range(SETS)]

    def variant(title: str, order: Callable[[Tensor, tuple[int, ...]], object]) -> Variant:
        note = f"{sum(sizes)} units, {len(sizes)} layers"
        return Variant(title, lambda: rotating(lambda alive: order(alive, sizes), masks), note=note)

    goals = [Goal("l0fast", 1, "1 launch", count="launches")] if device == "cuda" else []
    return measure(
        name,
        device,
        [variant("nonzero", by_nonzero), variant("l0fast", functional.compaction)],
        effort,
        baseline="nonzero",
        goals=goals,
        count_ops=True,
        count_launches=True,
    )


def cases(quick: bool) -> list[Case]:
    """The MLP's layers, and eight hidden layers of transformers, on both."""
    del quick
    found: list[Case] = []
    for device in ("cpu", "cuda"):
        for model, sizes in SIZES.items():
            name = f"compaction/{device}/{model}"
            found.append(Case(name, device, functools.partial(_run, name, sizes, device)))
    return found
