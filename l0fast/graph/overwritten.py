"""What an op that writes in place does to what is known of other views of the same memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from l0fast.graph.units import STAYS, Units, narrowed


def overwritten(
    before: Units,
    after: Units,
    of_zeros: Callable[[Units], Units | None],
    aside: bool,
    number: int,
) -> tuple[Tensor, Tensor]:
    """The units whose zeros, and those whose constants, an op has written over.

    Args:
        before: what it writes into.
        after: what it gives.
        of_zeros: what it makes of zeros.
        aside: what is written may be read by another way than from the writer.
        number: of all units.
    """
    labels, was, now = torch.broadcast_tensors(
        *(narrowed(values) for values in (before.labels, before.constant, after.constant))
    )
    tainted = labels[(was == 0) & (now != 0)]
    restless = labels[(was == was) & (now != was) & aside]
    if bool((labels == STAYS).any()):  # perhaps a view of what was followed
        zero = of_zeros(replace(before, constant=was.new_zeros(()).expand(before.labels.shape)))
        if zero is None or bool((narrowed(zero.constant) != 0).any()):
            tainted = torch.arange(number)
    return tainted, restless
