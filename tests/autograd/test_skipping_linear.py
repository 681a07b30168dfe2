"""A skipping linear layer, and chains of it, are what masked layers are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from l0fast import functional
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
