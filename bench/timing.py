"""Interleaved timing: A B A B ..., quartiles, and ratios of samples taken side by side.

Other work on the machine slows the A and the B of one round alike. So ratios within a round are
reliable, where times of separate runs are not.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]


class Quartiles(NamedTuple):
    """Of samples, by linear interpolation between them."""

    p25: float
    p50: float
    p75: float


def quartiles(samples: Sequence[float]) -> Quartiles:
    """The quartiles of one or more samples."""
    if len(samples) == 1:
        return Quartiles(samples[0], samples[0], samples[0])
    return Quartiles(*statistics.quantiles(samples, n=4, method="inclusive"))


def paired_ratios(samples: Sequence[float], baseline: Sequence[float]) -> Quartiles:
    """Quartiles of sample / baseline, round by round."""
    return quartiles([one / other for one, other in zip(samples, baseline, strict=True)])


@dataclass(frozen=True)
class Effort:
    """The length of a measurement: rounds of at least `sample_ms` a variant, after a warm-up."""

    rounds: int
    warmup: int
    sample_ms: float
    quick: bool = False


FULL = Effort(rounds=40, warmup=5, sample_ms=20.0)
FULL_GPU = Effort(rounds=20, warmup=3, sample_ms=4.0)
QUICK = Effort(rounds=7, warmup=2, sample_ms=2.0, quick=True)


def rotating(function: Callable[..., object], inputs: Iterable[tuple[Any, ...]]) -> Call:
    """A call that takes the next of several inputs each time, so that no cache holds them."""
    turn: Iterator[tuple[Any, ...]] = cycle(list(inputs))
    return lambda: function(*next(turn))


def cpu_sample(call: Call, repeats: int) -> float:
    """Milliseconds a call, by the wall clock."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def cuda_sample(call: Call, repeats: int) -> float:
    """Milliseconds a call, between two events on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def interleaved(
    calls: Mapping[str, Call], sample: Callable[[Call, int], float], effort: Effort
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """One sample of each call a round, in turn.

    Args:
        calls: name -> what to time. Each rotates its own inputs.
        sample: times so many repeats of a call, in milliseconds each.
        effort: how many rounds, and how long a sample is at least.

    Returns:
        name -> milliseconds a call, one for each round; and, for a call that raised in its
        warm-up, name -> why.
    """
    repeats: dict[str, int] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            # The first is the slowest, and any may fall into a busy moment.
            once = min(sample(call, 1) for _ in range(effort.warmup + 1))
        except Exception as error:
            failures[name] = one_line(error)
            continue
        repeats[name] = max(1, math.ceil(effort.sample_ms / max(once, 1e-6)))
        repeats[name] = min(repeats[name], 10_000)
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(effort.rounds):
            for name, times in repeats.items():
                samples[name].append(sample(calls[name], times))
    finally:
        if collecting:
            gc.enable()
    return samples, failures


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its words."""
    words = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {words[0][:160]}".removesuffix(": ")
