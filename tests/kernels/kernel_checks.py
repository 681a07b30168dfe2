"""What the kernels' tests share: the truth in float64, guarded memory, places to look away from."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete

SEED, STEP, TENSOR = 0x299F31D0_A4093822, 3, 5
SIZES = (0, 1, 63, 1023, 4097, 6007)
DISTRIBUTION = HardConcrete()
OTHER = HardConcrete(temperature=0.5, gamma=-0.3, zeta=1.2, noise_scale=0.25)

# Within this of a clamp's edge, rounding decides on which side a gate is, and with it whether it
# has a gradient: comparisons leave such a gate out. A hundred roundings of a number near 1.
EDGE = 1e-5

# The weight's dtype, and the result's: the last is autocast's.
DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-bf16"),
]

GUARD = 64
SENTINEL = 123


def constants(distribution: HardConcrete = DISTRIBUTION) -> Any:
    import l0fast_kernels

    return l0fast_kernels.constants(*distribution.numbers)


def gate(z: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * z in float32, rounded once to the result's dtype."""
    return (weight.float() * z).to(dtype)


def state(device: str) -> Tensor:
    return torch.tensor([SEED, STEP, TENSOR], dtype=torch.int64, device=device)


def noise(n: int, dtype: torch.dtype, distribution: HardConcrete = DISTRIBUTION) -> Tensor:
    """The reference's logistic noise for the named state, computed in ``dtype``."""
    return distribution.logistic_noise(philox.uniform(n, SEED, STEP, TENSOR).to(dtype))


def gate_and_slope(
    log_alpha: Tensor, distribution: HardConcrete = DISTRIBUTION
) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: z, its derivative by log_alpha, and which gates are clear of the edges."""
    log_alpha = log_alpha.double().cpu().flatten()
    width = distribution.zeta - distribution.gamma
    draw = noise(log_alpha.numel(), torch.float64, distribution)
    s = torch.sigmoid((log_alpha + distribution.noise_scale * draw) / distribution.temperature)
    raw = s * width + distribution.gamma
    inside = (raw > 0) & (raw < 1)
    slope = torch.where(inside, width / distribution.temperature * s * (1 - s), 0)
    return raw.clamp(0, 1), slope, (raw.abs() > EDGE) & ((raw - 1).abs() > EDGE)


def open_probability(
    log_alpha: Tensor, distribution: HardConcrete = DISTRIBUTION
) -> tuple[Tensor, Tensor]:
    """In float64: the open probability, and its derivative by log_alpha."""
    p = torch.sigmoid(log_alpha.double().cpu().flatten() + distribution.shift)
    return p, p * (1 - p)


@contextmanager
def guarded(launch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Every result a launcher allocates lies between sentinels, which must survive."""
    fences: list[Tensor] = []

    def empty(
        like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None, last: bool = False
    ) -> Tensor:
        n = torch.Size(shape).numel()
        memory = like.new_full((n + 2 * GUARD,), SENTINEL, dtype=dtype)
        fences.extend((memory[:GUARD], memory[GUARD + n :]))
        middle = memory[GUARD : GUARD + n]
        middle.fill_(torch.nan if middle.is_floating_point() else torch.iinfo(memory.dtype).max)
        if last:  # in memory [O, k, k, I]
            return middle.view([shape[d] for d in (0, 2, 3, 1)]).permute(0, 3, 1, 2)
        return middle.view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "empty", empty)
        yield
    assert fences
    for fence in fences:
        assert bool((fence == SENTINEL).all())


def assert_written(*results: Tensor) -> None:
    """No element is what unwritten memory holds in these tests."""
    for result in results:
        if result.is_floating_point():
            assert not bool(result.isnan().any())
        else:
            assert not bool((result == torch.iinfo(result.dtype).max).any())
