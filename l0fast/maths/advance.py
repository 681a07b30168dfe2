"""The end of a step: all gates back into their limits, and the multipliers' ascent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast.maths.lagrangian import ascend_


class Limits(NamedTuple):
    """Of a layer's log_alpha: what is at most `middle` becomes `lower`, and the rest is kept within
    `floor` and `top`."""

    lower: float
    middle: float
    floor: float
    top: float


def within(bound: float) -> Limits:
    """Those of gates that are drawn: -bound and bound."""
    return Limits(-bound, -math.inf, -bound, bound)


class Ascent(NamedTuple):
    """What multipliers move by (see `lagrangian.ascend_`), and what counts the step."""

    multiplier: Tensor
    violation: Tensor
    restarts: Tensor
    lr: Tensor
    limit: float
    taken: Tensor | None
    """0-d, or None."""


def hold_(log_alpha: Tensor, limits: Limits) -> None:
    """Puts gates within their limits, in place.

    Equals: log_alpha = where(log_alpha <= middle, lower, clamp(log_alpha, floor, top))
    """
    if limits.middle == -math.inf:
        log_alpha.clamp_(limits.floor, limits.top)
        return
    gone = log_alpha <= limits.middle
    log_alpha.clamp_(limits.floor, limits.top).masked_fill_(gone, limits.lower)


def hold_all_(log_alphas: Sequence[Tensor], limits: Sequence[Limits]) -> None:
    """`hold_` of many layers: end to end where it takes several operations, so that their number
    costs few."""
    together: dict[Any, list[Tensor]] = {}
    for log_alpha, own in zip(log_alphas, limits, strict=True):
        # A DTensor: each process has its part.
        apart = type(log_alpha) not in (Tensor, nn.Parameter)
        if apart or own.middle == -math.inf:
            hold_(log_alpha, own)
        else:
            together.setdefault((own, log_alpha.dtype, log_alpha.device), []).append(log_alpha)
    for (own, *_), some in together.items():
        flat = torch.cat([log_alpha.flatten() for log_alpha in some])
        hold_(flat, own)
        parts = flat.split([log_alpha.numel() for log_alpha in some])
        held = [part.view(one.shape) for part, one in zip(parts, some, strict=True)]
        torch._foreach_copy_(some, held)  # pyright: ignore[reportPrivateImportUsage]


def advance_(log_alphas: Sequence[Tensor], limits: Sequence[Limits], ascent: Ascent | None) -> None:
    """Ends a step, in place: the multipliers move, if they do, and gates are put within limits."""
    if ascent is not None:
        ascend_(*ascent[:4], ascent.limit)
        if ascent.taken is not None:
            ascent.taken.add_(1)
    hold_all_(log_alphas, limits)
