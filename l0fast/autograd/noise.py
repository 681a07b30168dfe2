"""What names the noise of one draw on a GPU, taken from torch's generator."""

from __future__ import annotations

import torch
from torch import Tensor

from l0fast.autograd import direct
from l0fast.maths import philox

NoiseName = Tensor | tuple[int, int, int]
"""(seed, step, tensor) of Philox: int64 [3] on the device, or numbers that the host has."""

KEY = 0x9E3779B97F4A7C15
"""Tells the noise of gates from what PyTorch draws by the same seed and offset."""
OFFSET = 4
"""By how much a draw moves the generator on: as PyTorch's own smallest does."""


def noise_name(device: torch.device) -> NoiseName:
    """The name of a new draw's noise: a function of the seed and of what was drawn since, as with
    any op of PyTorch.

    The host has the seed of a CUDA generator and its offset: nothing is launched for them. A CUDA
    graph must read them anew in each replay, and a compiler must see an op: they draw a tensor.
    """
    if device.type != "cuda" or not direct.is_possible():
        return _drawn(device)
    if torch.cuda.is_current_stream_capturing():
        return _drawn(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + OFFSET)
    count = offset // OFFSET
    return philox.signed(generator.initial_seed() ^ KEY), count & philox.MASK, count >> 32


def _drawn(device: torch.device) -> Tensor:
    return torch.randint(2**63 - 1, (3,), device=device)
