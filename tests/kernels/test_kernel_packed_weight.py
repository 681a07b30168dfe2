"""The kernels of l0fast_kernels.packed_weight, against float64 truth and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast import functional
from l0fast.maths.compaction import MULTIPLE, Order, bound
from l0fast.maths.packed_weight import pack as pack_reference
from l0fast.maths.packed_weight import unpack as unpack_reference
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import DTYPES, assert_written, guarded

# Rows, columns, how much of each is open (None: no order), and whether the columns have gates:
# parts of tiles and several of them, one unit, nothing and everything open.
CASES = [
    (130, 300, 0.5, 0.3, True),
    (130, 300, 0.5, None, True),
    (130, 300, None, 0.3, False),
    (64, 128, 1.0, 1.0, True),
    (70, 200, 0.0, 0.4, True),
    (70, 200, 0.4, 0.0, False),
    (1, 1, 1.0, 1.0, True),
    (20, 30, None, None, True),
]


def order_of(size: int, part: float | None) -> Order | None:
    if part is None:
        return None
    return functional.compaction(torch.rand(size) < part, (size,))[0]


def on_device(order: Order | None, field: str) -> tuple[Tensor, Tensor] | None:
    """What a kernel is given of an order: its index or place, and the count."""
    if order is None:
        return None
    return getattr(order, field).to(DEVICE), order.count.to(DEVICE)


def before(order: Order | None, size: int) -> int:
    """How many places a product may read: those before the rounded count."""
    return size if order is None else int(bound(order.count, size))


@kernel_test
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_is_no_more_wrong_than_the_reference(
    case: Any, dtype: torch.dtype, out_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import launch, pack

    n, k, open_rows, open_columns, gated = case
    rows, columns = order_of(n, open_rows), order_of(k, open_columns)
    weight = torch.randn(n, k).to(dtype)
    z = torch.rand(k) if gated else None
    indices = on_device(rows, "index"), on_device(columns, "index")
    with guarded(launch, monkeypatch):
        got = pack(
            weight.to(DEVICE), None if z is None else z.to(DEVICE), *indices, MULTIPLE, out_dtype
        )
    assert got.dtype == out_dtype
    corner = slice(before(rows, n)), slice(before(columns, k))
    reference = pack_reference(weight, z, rows, columns, out_dtype)[corner].clone()
    wide = None if z is None else z.double()
    truth = pack_reference(weight.double(), wide, rows, columns, torch.float64)[corner]
    assert_no_more_wrong(got.cpu()[corner], reference, truth, name="packed")


@kernel_test
@pytest.mark.parametrize(("dtype", "packed_dtype"), DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_unpacking_is_no_more_wrong_than_the_reference(
    case: Any, dtype: torch.dtype, packed_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import launch, unpack

    n, k, open_rows, open_columns, gated = case
    rows, columns = order_of(n, open_rows), order_of(k, open_columns)
    weight, dpacked = torch.randn(n, k).to(dtype), torch.randn(n, k).to(packed_dtype)
    z = torch.rand(k) if gated else None
    # What lies beyond the counts was computed by nobody, and is not read.
    opened = [n if rows is None else int(rows.count), k if columns is None else int(columns.count)]
    dpacked[opened[0] :] = torch.nan
    dpacked[:, opened[1] :] = torch.nan
    places = on_device(rows, "place"), on_device(columns, "place")
    with guarded(launch, monkeypatch):
        dweight, dz = unpack(
            dpacked.to(DEVICE),
            weight.to(DEVICE),
            None if z is None else z.to(DEVICE),
            *places,
        )
    assert_written(dweight)
    assert dweight.dtype == dtype
    reference, dz_reference = unpack_reference(dpacked, weight, z, rows, columns)
    wide = None if z is None else z.double()
    truth, dz_truth = unpack_reference(dpacked.double(), weight.double(), wide, rows, columns)
    assert_no_more_wrong(dweight.cpu(), reference, truth, name="dweight")
    assert (dz is None) == (z is None)
    if dz is None:
        return
    assert_written(dz)
    assert dz_reference is not None
    assert dz_truth is not None
    _, terms = unpack_reference(dpacked.double().abs(), weight.double().abs(), wide, rows, columns)
    assert_no_more_wrong(dz.cpu(), dz_reference, dz_truth, magnitude=terms, name="dz")
