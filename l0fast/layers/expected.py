"""How many gates are expected to be open: what a draw has counted, or computed anew."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from l0fast.layers.draw import Counted


@functools.lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def _latest_count(layer: Any) -> Counted | None:
    """The count of a layer's latest draw, unless its log_alpha has changed since."""
    for board, place in layer._places:
        counted = board.counted[place]
        if counted is not None:
            return counted
    return None


def expected_open(layers: Sequence[Any]) -> Tensor:
    """[L] expected number of open gates of each layer, differentiable.

    What the last draw has counted is handed out once; else it is computed from log_alpha.
    """
    found = [_latest_count(layer) for layer in layers]
    draws = {counted.counts for counted in found if counted is not None}
    taken = {counts: counts.take() for counts in draws}
    usable = [
        None if c is None or not c.holds(layer.log_alpha) else c
        for c, layer in zip(found, layers, strict=True)
    ]
    places = [None if c is None else c.index for c in usable]
    if len(taken) == 1 and None not in places:
        (totals,) = taken.values()
        if totals is not None:
            if places == list(range(totals.numel())):
                return totals.view(-1)
            return totals.view(-1).index_select(0, _index(tuple(places), totals.device))  # type: ignore[arg-type]
    parts: list[Tensor] = []
    for layer, counted in zip(layers, usable, strict=True):
        totals = None if counted is None else taken[counted.counts]
        if totals is None or counted is None:
            dtype = torch.promote_types(layer.log_alpha.dtype, torch.float32)
            parts.append(layer.own(layer.open_probability()).sum(dtype=dtype))
        else:
            parts.append(totals.view(-1)[counted.index])
    # The layers of a model may lie on several devices.
    return torch.stack([part.to(parts[0].device) for part in parts])
