"""Skipping on a GPU, where asking which gates are open would make the host wait.

Chains of linear layers are computed without asking: their kernels read the counts where they are.
Convolutions need sizes that the host knows: then the gates of the whole model are read back at
once, and the indices made of them sent in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l0fast import functional
from l0fast.layers.draw import Compact, OnDevice

MULTIPLE = 64
"""How many units are computed is rounded up to it where a convolution is read on a GPU: few
widths, as each new one makes cuDNN choose its kernel again, and whole tiles of its products."""


def on_gpu(tensors: Mapping[int, Tensor]) -> bool:
    """Whether the gates of a step are drawn on a GPU."""
    return any(tensor.is_cuda for tensor in tensors.values())


def read_back(opened: dict[int, Tensor]) -> dict[int, Tensor]:
    """The same masks where the host can see them, in one transfer."""
    parts = torch.cat(list(opened.values())).cpu().split([len(one) for one in opened.values()])
    return dict(zip(opened, parts, strict=True))


def send(compacts: dict[int, Compact], device: torch.device) -> dict[int, Compact]:
    """The same indices on the device, in one transfer; those that are one tensor stay one."""
    found = {id(part): part for one in compacts.values() for part in one if part is not None}
    if not found:
        return compacts
    together = torch.cat(list(found.values())).to(device, non_blocking=True)
    parts = together.split([len(part) for part in found.values()])
    moved: dict[int, Tensor | None] = dict(zip(found, parts, strict=True))
    return {
        key: Compact(*(None if part is None else moved[id(part)] for part in one))
        for key, one in compacts.items()
    }


def orders(ends: list[tuple[int, list[int], Tensor]]) -> dict[int, OnDevice]:
    """What each linear layer of some chains leaves out, with no read by the host.

    Args:
        ends: of each link, the id of its maker, the ids of its readers, and bool, which of the
            units between them are alive.
    """
    alive = [mask for _, _, mask in ends]
    found: dict[int, OnDevice] = {}
    if not alive:
        return found
    sizes = tuple(len(mask) for mask in alive)
    listed = functional.compaction(torch.cat(alive), sizes)
    nothing = OnDevice(None, None)
    for (maker, readers, _), order in zip(ends, listed, strict=True):
        found[maker] = found.get(maker, nothing)._replace(rows=order)
        for reader in readers:
            found[reader] = found.get(reader, nothing)._replace(cols=order)
    return found
