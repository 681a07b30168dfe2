"""Products of what is open: within the rounded counts they are matmul's, beyond them zero."""

from __future__ import annotations

import pytest
import torch

from l0fast import functional
from l0fast.maths.bounded_matmul import bounded_matmul

SIZES = (70, 130, 200)
OPEN = (3, 65, 100)
COUNTS = (64, 128, 128)
"""OPEN, rounded up to a multiple of 64."""


@pytest.mark.parametrize("bounded", ["m", "n", "k", "mnk"])
def test_it_is_the_product_of_what_is_open(bounded: str) -> None:
    alive = torch.cat([torch.randperm(size) < some for size, some in zip(SIZES, OPEN, strict=True)])
    every = dict(zip("mnk", functional.compaction(alive, SIZES), strict=True))
    orders = {name: every[name] for name in bounded}
    m, n, k = (
        count if name in bounded else size
        for name, size, count in zip("mnk", SIZES, COUNTS, strict=True)
    )
    a, b = torch.randn(SIZES[0], SIZES[2]).double(), torch.randn(SIZES[2], SIZES[1]).double()
    bias = torch.randn(SIZES[1]).double()
    expected = torch.zeros(SIZES[:2], dtype=torch.float64)
    ordered = bias[every["n"].index.long()] if "n" in bounded else bias
    expected[:m, :n] = a[:m, :k] @ b[:k, :n] + ordered[:n]
    # What lies beyond the count is not read.
    a[:, k:] = torch.nan
    b[k:] = torch.nan
    got = bounded_matmul(a, b, **orders, bias=bias)
    torch.testing.assert_close(got, expected)


def test_products_of_16_bits_are_summed_in_32() -> None:
    a, b = torch.full((2, 4096), 0.1, dtype=torch.bfloat16), torch.ones(4096, 3).bfloat16()
    expected = a[0, 0].double() * 4096
    got = bounded_matmul(a, b)
    assert got.dtype == torch.bfloat16
    assert float(got[0, 0]) == pytest.approx(float(expected), rel=2**-8)
