"""The host's fast way to launch a kernel again, with a kernel that only notes how it is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch


class Noted:
    """Stands for a Triton kernel, and for what it compiles to."""

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        if len(grid) == 3:
            return lambda *arguments: self.again.append(arguments)

        def first(*arguments: Any, **options: Any) -> Noted:
            self.compiled.append((grid, arguments, options))
            return self

        return first


def test_a_kernel_is_compiled_once_for_each_kind_of_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from l0fast_kernels import launch

    device = [-1]  # what a tensor on the CPU says
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    noted = Noted()
    run = launch.Launch(noted, (2, 3), (7, 0.5), {"BLOCK": 16})
    memory = torch.zeros(64)
    aligned, other = memory[:16], torch.zeros(16)
    run(aligned, aligned)
    assert noted.compiled == [
        ((2, 3), (aligned, aligned, 7, 0.5), {"BLOCK": 16, "num_warps": launch.WARPS})
    ]
    run(other, aligned)
    assert len(noted.again) == 1
    assert noted.again[0][0] is other
    assert noted.again[0][2:] == (7, 0.5, 16)
    run(memory[1:17], aligned)  # not of 16 bytes
    run(aligned, memory[1:17])
    run(aligned.half(), aligned)
    assert (len(noted.compiled), len(noted.again)) == (4, 1)
