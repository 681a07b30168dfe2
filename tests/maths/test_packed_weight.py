"""The open part of a weight in one corner: what is packed, and its gradient put back."""

from __future__ import annotations

import pytest
import torch

from l0fast import functional
from l0fast.maths.packed_weight import pack, unpack


def test_open_rows_and_columns_come_first_in_their_order() -> None:
    weight, z = torch.randn(5, 4), torch.rand(4)
    rows, cols = functional.compaction(torch.tensor([0, 1, 0, 1, 1, 1, 0, 0, 1]).bool(), (5, 4))
    packed = pack(weight, z, rows, cols, torch.float32)
    assert torch.equal(packed[:3, :2], (weight * z)[[1, 3, 4]][:, [0, 3]])
    assert torch.equal(pack(weight, None, rows, None, torch.float32)[:3], weight[[1, 3, 4]])
    assert torch.equal(pack(weight, z, None, None, torch.float64), (weight * z).double())


@pytest.mark.parametrize("gated", [True, False])
def test_the_gradient_is_autograds(gated: bool) -> None:
    weight = torch.randn(30, 40, dtype=torch.float64, requires_grad=True)
    z = torch.rand(40, dtype=torch.float64, requires_grad=True) if gated else None
    rows, cols = functional.compaction(torch.rand(70) < 0.5, (30, 40))
    packed = pack(weight, z, rows, cols, torch.float64)
    dpacked = torch.randn_like(packed)
    # Autograd knows nothing of counts: the gradient of what is closed is zero.
    dpacked[int(rows.count) :] = 0
    dpacked[:, int(cols.count) :] = 0
    leaves = [weight] if z is None else [weight, z]
    expected = torch.autograd.grad(packed, leaves, dpacked)
    detached = None if z is None else z.detach()
    got = unpack(dpacked, weight.detach(), detached, rows, cols)
    for one, wanted in zip(got, expected, strict=False):
        assert one is not None
        torch.testing.assert_close(one, wanted)
    assert (got[1] is None) == (z is None)


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
