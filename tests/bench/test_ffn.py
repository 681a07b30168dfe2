"""Ways to leave closed units out of a feed-forward block: they compute the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bench_ffn, registry, report, timing
from bench.bench_ffn import Block, Results, Way

SIZES = (16, 96, 24)
LITTLE = timing.Effort(rounds=3, warmup=1, sample_ms=0.0, quick=True)
GROUPED = pytest.param(
    "grouped",
    marks=pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has none"),
)


def given(dtype: torch.dtype, density: float = 0.4) -> tuple[Block, Tensor, Tensor, Tensor]:
    width, hidden, tokens = SIZES
    block = bench_ffn.block_of(SIZES, "cpu", dtype)
    x, dy = torch.randn(2, tokens, width, dtype=dtype)
    return block, x, dy, bench_ffn.gates_of(hidden, density, "cpu", dtype)


def by_autograd(block: Block, x: Tensor, dy: Tensor, z: Tensor) -> Results:
    """The truth, in float64; closed units get no gradient."""
    leaves = [one.double().requires_grad_() for one in (x, *block, z)]
    of_x, weight, bias, second, second_bias, gates = leaves
    h = F.linear(of_x, weight, bias)
    y = F.gelu(h) @ (second * gates.unsqueeze(1)) + second_bias
    return Results(y.detach(), *torch.autograd.grad(y, leaves, dy.double()))


def ways() -> dict[str, Way]:
    hidden = SIZES[1]
    return {
        "masked": bench_ffn.masked,
        "kernels": bench_ffn.kernels,
        "prefix": bench_ffn.prefix(64),
        "prefix of all": bench_ffn.prefix(hidden),
        "overflow": bench_ffn.prefix_or_masked(8),
        "room": bench_ffn.prefix_or_masked(64),
        "grouped": bench_ffn.grouped,
    }


@pytest.mark.parametrize(
    "name", ["masked", "kernels", "prefix", "prefix of all", "overflow", "room", GROUPED]
)
def test_every_way_computes_the_same(name: str) -> None:
    dtype = torch.bfloat16 if name == "grouped" else torch.float32
    block, x, dy, z = given(dtype)
    got, truth = ways()[name](block, x, dy, z), by_autograd(block, x, dy, z)
    opened = z > 0
    assert 8 < int(opened.sum()) < 64
    for part, one, true in zip(Results._fields, got, truth, strict=True):
        if part == "dz":
            one, true = one[opened], true[opened]
        assert one.shape == true.shape
        scale = float(true.abs().max())
        error = float((one.double() - true).abs().max()) / scale
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-5), (part, error)


def test_a_prefix_that_is_too_short_is_noticed_and_wrong() -> None:
    block, x, dy, z = given(torch.float32)
    assert bool(bench_ffn.overflows(z, 8))
    assert not bool(bench_ffn.overflows(z, int((z > 0).sum())))
    short = bench_ffn.prefix(8)(block, x, dy, z)
    assert float((short.y - by_autograd(block, x, dy, z).y).abs().max()) > 1e-2


def test_a_bucket_has_room_for_the_next_step() -> None:
    assert bench_ffn.bucket_of(0, 16384) == 0
    assert bench_ffn.bucket_of(16384, 16384) == 16384
    room = bench_ffn.bucket_of(4915, 16384)
    assert room % bench_ffn.BUCKET == 0
    counts = [int((bench_ffn.gates_of(16384, 0.3, "cpu", torch.float32) > 0).sum()) for _ in "1234"]
    assert max(counts) <= room < 16384 * 0.36


def test_the_cases_are_rehearsed_small_and_fit_a_card_of_80_gb() -> None:
    rows = bench_ffn.ffn("x", SIZES, 0.3, LITTLE, "cpu")
    titles = ["dense", "masked", "own kernels", "prefix"]
    assert [row.variant for row in rows][:4] == titles
    assert {row.status for row in rows} == {report.MEASURED}, rows
    assert bench_ffn.peak_mib(bench_ffn.FFN, 5) < bench_ffn.MOST_MIB
    with pytest.raises(RuntimeError, match="MiB; expected 24000 at most"):
        bench_ffn.ffn("x", (8192, 65536, 16384), 0.3, LITTLE, "cpu")
    names = [one.name for one in registry.cases(quick=False) if one.device == "cuda"]
    assert [names.index(f"ffn/cuda/density-{d:g}") for d in (0.5, 0.3, 0.1)] == [3, 4, 5]
