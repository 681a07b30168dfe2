"""The compaction kernel against the reference, exactly."""

from __future__ import annotations

import pytest
import torch

from l0fast.maths.compaction import compaction
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.kernels.kernel_checks import assert_written, guarded


@kernel_test
@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(1,), (7, 1, 0, 1023), (1024, 1025, 4097), (300, 100)], ids=str)
def test_orders_are_the_references(
    sizes: tuple[int, ...], part: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import compaction_forward, launch

    alive = torch.rand(sum(sizes)) < part
    with guarded(launch, monkeypatch):
        index, place, count = compaction_forward(alive.to(DEVICE), sizes)
    assert_written(index, place, count)
    found = zip(index.cpu().split(sizes), place.cpu().split(sizes), count.cpu(), strict=True)
    for (one, where, many), expected in zip(found, compaction(alive, sizes), strict=True):
        assert torch.equal(one, expected.index)
        assert torch.equal(where, expected.place)
        assert many == expected.count
