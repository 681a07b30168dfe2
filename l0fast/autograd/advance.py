"""The end of a step: by one launch where kernels run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from l0fast.autograd.apart import lie_apart
from l0fast.autograd.lagrangian import kernels_of
from l0fast.maths import advance as maths
from l0fast.maths.advance import Ascent, Limits


def advance_(
    log_alphas: Sequence[Tensor], limits: tuple[Limits, ...], ascent: Ascent | None
) -> None:
    """Ends a step, in place, see `maths.advance`; called without autograd."""
    moved = [] if ascent is None else [one for one in ascent if isinstance(one, Tensor)]
    kernels = kernels_of(*moved or log_alphas) if lie_apart(log_alphas) else None
    if kernels is None:
        maths.advance_(log_alphas, limits, ascent)
        return
    kernels.advance_(log_alphas, limits, ascent)
    # As any operation in place does: autograd and the counts of draws look at it.
    torch.autograd.graph.increment_version([*log_alphas, *moved])
