"""A skipping linear layer, and chains of it, are what masked layers are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from l0fast import functional
from l0fast.maths.bounded_matmul import bounded_matmul
from l0fast.maths.packed_weight import pack, unpack
from tests.helpers.tolerance import rounding_tolerance

EXACT = 1e-10


def chain(
    sizes: tuple[int, int, int, int], leaves: list[Tensor], gates: list[Tensor], skip: bool
) -> Tensor:
    """Three linear layers with gates on the two hidden ones' units."""
    x, w1, b1, w2, b2, w3, b3 = leaves
    z1, z2 = gates
    if not skip:
        h = torch.sigmoid(F.linear(x, w1, b1))
        h = torch.sigmoid(F.linear(h, w2 * z1, b2))
        return F.linear(h, w3 * z2, b3)
    alive = torch.cat([z1 > 0, z2 > 0])
    first, second = functional.compaction(alive, sizes[1:3])
    layer = functional.skipping_linear
    h = torch.sigmoid(layer(x, w1, b1, rows=first))
    h = torch.sigmoid(layer(h, w2, b2, z1, rows=second, cols=first))
    return layer(h, w3, b3, z2, cols=second)


@settings(max_examples=60)
@given(
    sizes=st.tuples(*[st.integers(1, 150)] * 4),
    batch=st.integers(1, 5),
    open_part=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_chain_is_the_masked_chain(
    sizes: tuple[int, int, int, int], batch: int, open_part: float, seed: int
) -> None:
    torch.manual_seed(seed)
    n0, n1, n2, n3 = sizes
    shapes = [(batch, n0), (n1, n0), (n1,), (n2, n1), (n2,), (n3, n2), (n3,)]
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    gates = [torch.rand(n).double() * (torch.rand(n) < open_part) for n in (n1, n2)]
    results: list[list[Tensor]] = []
    for skip in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in start]
        drawn = [gate.clone().requires_grad_() for gate in gates]
        y = chain(sizes, leaves, drawn, skip)
        y.square().sum().backward()
        found = [y.detach(), *(leaf.grad for leaf in (*leaves, *drawn))]
        # A closed gate's gradient ends in its draw, which clamps it.
        results.append([one for one in found if one is not None])
    for z, masked, skipped in zip(gates, results[0][-2:], results[1][-2:], strict=True):
        assert bool((skipped[z == 0] == 0).all())
        torch.testing.assert_close(skipped[z > 0], masked[z > 0], rtol=EXACT, atol=EXACT)
    for masked, skipped in zip(results[0][:-2], results[1][:-2], strict=True):
        torch.testing.assert_close(skipped, masked, rtol=EXACT, atol=EXACT)


def test_without_orders_it_is_a_masked_layer() -> None:
    x, weight, bias, z = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5), torch.rand(8)
    got = functional.skipping_linear(x, weight, bias, z)
    error = (got - F.linear(x, weight * z, bias)).abs()
    # Sums of 8 products, in another order.
    assert bool((error <= rounding_tolerance(torch.float32, 32.0, roundings=8)).all())


def test_what_lies_beyond_the_counts_is_not_read() -> None:
    alive = torch.arange(150) < 70  # of which 128 are computed
    (order,) = functional.compaction(alive, (150,))
    x, weight = torch.randn(4, 150), torch.randn(9, 150)
    x[:, 128:] = torch.nan
    y = functional.skipping_linear(x, weight, cols=order)
    assert bool(torch.isfinite(y).all())
    x[:, 127] = torch.nan
    assert not bool(torch.isfinite(functional.skipping_linear(x, weight, cols=order)).all())


def test_what_lies_beyond_the_counts_is_zero() -> None:
    (order,) = functional.compaction(torch.arange(150) >= 90, (150,))
    x, weight = torch.randn(4, 6), torch.randn(150, 6)
    y = functional.skipping_linear(x, weight, rows=order)
    torch.testing.assert_close(y[:, :60], F.linear(x, weight[90:]))
    assert bool((y[:, :64] != 0).all())
    assert bool((y[:, 64:] == 0).all())


def test_a_packed_gradient_goes_back_where_it_came_from() -> None:
    rows, cols = functional.compaction(torch.rand(70) < 0.5, (30, 40))
    weight, z = torch.randn(30, 40).double(), torch.rand(40).double()
    packed = pack(weight, z, rows, cols, torch.float64)
    dweight, dz = unpack(torch.ones_like(packed), weight, z, rows, cols)
    opened = (rows.place < rows.count)[:, None] & (cols.place < cols.count)[None, :]
    assert torch.equal(dweight, opened * z)
    assert dz is not None
    torch.testing.assert_close(dz, (opened * weight).sum(0))
    # The row that stands first is the first open one.
    first = int(opened.any(1).int().argmax())
    assert torch.equal(packed[0, : int(cols.count)], (weight * z)[first][opened[first]])


def test_products_of_16_bits_are_summed_in_32() -> None:
    a, b = torch.full((2, 4096), 0.1, dtype=torch.bfloat16), torch.ones(4096, 3).bfloat16()
    expected = a[0, 0].double() * 4096
    got = bounded_matmul(a, b)
    assert got.dtype == torch.bfloat16
    assert float(got[0, 0]) == pytest.approx(float(expected), rel=2**-8)
