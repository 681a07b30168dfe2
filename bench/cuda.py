"""Parts of a measurement on a GPU: its cache, a copy, CUDA graphs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.timing import Call, rotating

BEYOND = 4
"""Inputs are rotated over this many times the L2 cache."""


def available() -> bool:
    return torch.cuda.is_available()


def sets_beyond_cache(bytes_per_set: int) -> int:
    """The number of input sets that exceed the L2 cache together; at least two."""
    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(2, min(64, math.ceil(BEYOND * cache / max(bytes_per_set, 1))))


def copying(bytes_moved: int, sets: int) -> Call:
    """A device-to-device copy that moves so many bytes, reads and writes counted together."""
    half = max(1, bytes_moved // 2)

    def buffer() -> Tensor:
        return torch.randint(0, 256, (half,), dtype=torch.uint8, device="cuda")

    def copy(target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    return rotating(copy, [(buffer(), buffer()) for _ in range(sets)])


def graphed(call: Call, times: int = 1) -> Call:
    """A replay of a CUDA graph that holds `times` calls: the launch gaps shrink.

    To be built and replayed on a side stream, the one on which everything before it ran: autograd
    runs a backward on its forward's stream.
    """
    for _ in range(max(3, times)):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(times):
            call()
    torch.cuda.synchronize()
    return graph.replay
