"""The stages of a training: what the gates of a layer are in each."""

from __future__ import annotations

import functools
from dataclasses import replace

from l0fast.maths.hard_concrete import HardConcrete

DRAWN, OPEN, SETTLED, QUIET = "drawn", "open", "settled", "quiet"
STAGES = (DRAWN, OPEN, SETTLED, QUIET)
"""What the gates of a layer may be (see `draw.Drawn.stage`); a state names one by its place."""
QUIET_NOISE = 0.1
"""The noise_scale of quiet gates, if theirs is larger."""


@functools.lru_cache(maxsize=64)
def quieter(of: HardConcrete) -> HardConcrete:
    """What quiet gates are drawn from: one object for all layers, as draws are grouped by it."""
    return replace(of, noise_scale=min(QUIET_NOISE, of.noise_scale))
