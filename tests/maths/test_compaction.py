"""Orders: open units first, each unit once."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from l0fast import functional
from l0fast.maths.compaction import MULTIPLE, Order, below, bound


@given(st.lists(st.lists(st.booleans(), max_size=150), min_size=1, max_size=4))
def test_open_ones_ascend_then_closed_ones_descend(parts: list[list[bool]]) -> None:
    sizes = tuple(map(len, parts))
    alive = torch.tensor([one for part in parts for one in part], dtype=torch.bool)
    for part, order in zip(parts, functional.compaction(alive, sizes), strict=True):
        opens = [unit for unit, is_open in enumerate(part) if is_open]
        closed = [unit for unit, is_open in enumerate(part) if not is_open]
        assert order.index.tolist() == opens + closed[::-1]
        assert order.place[order.index.long()].tolist() == list(range(len(part)))
        assert order.count.tolist() == [len(opens)]
        assert {tensor.dtype for tensor in order} == {torch.int32}


def test_a_count_is_rounded_up_within_its_size() -> None:
    for count, size, expected in (
        (0, 200, 0),
        (1, 200, MULTIPLE),
        (MULTIPLE, 200, MULTIPLE),
        (MULTIPLE + 1, 200, 2 * MULTIPLE),
        (199, 200, 200),
        (5, 7, 7),
    ):
        counted = torch.tensor([count], dtype=torch.int32)
        assert bound(counted, size).tolist() == [expected]
        order = Order(torch.empty(0), torch.empty(0), counted)
        assert int(below(order, size, counted.device).sum()) == expected
    assert bool(below(None, 9, torch.device("cpu")).all())
