"""Which units are open, in order, without leaving the device: one launch for all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels import launch
from l0fast_kernels.launch import WARPS

BLOCK = 1024


@triton.jit
def compaction_kernel(
    alive_ptr,
    offset_ptr,
    index_ptr,
    place_ptr,
    count_ptr,
    BLOCK: tl.constexpr,
):
    """place[i] = (open units up to i) - 1           where unit i is open
             = size - (closed units up to i)         where it is closed
    index[place[i]] = i
    count = open units

    of one segment a program, in which i counts from the segment's start.
    """
    segment = tl.program_id(0)
    start = tl.load(offset_ptr + segment)
    size = (tl.load(offset_ptr + segment + 1) - start).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    first = size * 0
    n_open = size * 0
    while first < size:
        unit = first + lane
        inside = unit < size
        is_open = tl.load(alive_ptr + start + unit, mask=inside, other=0) != 0
        opens = is_open.to(tl.int32)
        # Closed units before the block: first - n_open.
        before = tl.cumsum(opens, 0)
        from_front = n_open + before - 1
        from_back = size - (first - n_open) - (lane + 1 - before)
        place = tl.where(is_open, from_front, from_back)
        tl.store(place_ptr + start + unit, place, mask=inside)
        tl.store(index_ptr + start + place, unit, mask=inside)
        n_open += tl.sum(opens, 0)
        first += BLOCK
    tl.store(count_ptr + segment, n_open)


def compaction_forward(alive: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The order of each of L segments' units, open ones first.

    Args:
        alive: bool [N], contiguous: the segments end to end.
        sizes: the segments' lengths, with sum N.

    Returns:
        int32 index [N] and place [N], each from its segment's start, and count [L].
    """
    n, segments = alive.numel(), len(sizes)
    index = launch.empty(alive, (n,), torch.int32)
    place = launch.empty(alive, (n,), torch.int32)
    count = launch.empty(alive, (segments,), torch.int32)
    if segments:
        with launch.on(alive):
            compaction_kernel[(segments,)](
                alive.view(torch.int8),
                launch.offsets(sizes, alive.device),
                index,
                place,
                count,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return index, place, count
