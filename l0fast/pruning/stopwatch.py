"""Seconds of calls and of whole models, beside whatever else the machine does."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from l0fast.graph.calls import Example

ROUNDS = (8, 25)
"""Samples of each call, at least and at most, and"""
SECONDS = 8.0
"""in about how long a time."""
SAMPLE_S = 2e-4
"""A sample takes about that long, or one call."""

Call = Callable[[], object]
Build = Callable[[], list[Call]]


def quartiles(builds: list[Build], device: torch.device) -> list[float]:
    """Seconds of some calls, of interleaved samples, each after a call that warms up.

    Args:
        builds: each makes a few of the calls, anew in each round: all of them at once might not
            fit into memory.
        device: where they run.
    """
    cuda = device.type == "cuda"
    times: dict[tuple[int, int], int] = {}
    """How many calls make a sample."""

    def timed(call: Call, number: int) -> float:
        if cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(device)
            start.record()
            for _ in range(number):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3 / number
        began = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - began) / number

    def sample(key: tuple[int, int], call: Call) -> float:
        call()
        if key not in times:  # the first call of all makes what later ones find
            times[key] = max(1, min(50, int(SAMPLE_S / max(timed(call, 1), 1e-7))))
        return timed(call, times[key])

    def round_() -> list[float]:
        calls = (((i, j), call) for i, b in enumerate(builds) for j, call in enumerate(b()))
        return [sample(key, call) for key, call in calls]

    round_()
    began = time.perf_counter()
    samples = [round_()]
    each = time.perf_counter() - began
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(SECONDS / each)))
    samples += [round_() for _ in range(rounds - 1)]
    # The lower quartile: what else runs on the machine only ever adds.
    return [statistics.quantiles(column, n=4)[0] for column in zip(*samples, strict=True)]


def whole(models: list[nn.Module], example: Example) -> Build:
    return lambda: [lambda model=model: example.call(model) for model in models]


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def whole_seconds(models: list[nn.Module], example: Example) -> list[float]:
    """Seconds of one forward of each of some models on an example, in evaluation."""
    training = [model.training for model in models]
    try:
        with torch.no_grad():
            return quartiles([whole([m.eval() for m in models], example)], device_of(models[0]))
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
