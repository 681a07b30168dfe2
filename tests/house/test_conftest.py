"""The conditions that conftest promises do hold."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import ROOT

AT_COLLECTION = torch.empty(9)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALLOCATORS: dict[str, Callable[[torch.dtype], Tensor]] = {
    "empty": lambda dtype: torch.empty(3, 5, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.ones(3, 5, dtype=dtype)),
    "empty_like_strided": lambda dtype: torch.empty_like(torch.ones(5, 3, dtype=dtype).t()),
    "new_empty": lambda dtype: torch.ones(1, dtype=dtype).new_empty(3, 5),
    "empty_strided": lambda dtype: torch.empty_strided((3, 5), (1, 3), dtype=dtype),
    "new_empty_strided": lambda dtype: torch.ones(1, dtype=dtype).new_empty_strided((3,), (1,)),
    "empty_permuted": lambda dtype: torch.empty_permuted((3, 5), (1, 0), dtype=dtype),
    "out=": lambda dtype: torch.empty(0, dtype=dtype).resize_(3, 5),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ALLOCATORS)
def test_unwritten_memory_is_nan(name: str, dtype: torch.dtype) -> None:
    for _ in range(3):  # freshly mapped pages are zero; reused ones are not
        assert ALLOCATORS[name](dtype).isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_unwritten_integers_are_their_largest(dtype: torch.dtype) -> None:
    assert (torch.empty(7, dtype=dtype) == torch.iinfo(dtype).max).all()


def test_a_result_that_was_not_fully_written_shows() -> None:
    out = torch.empty(4)
    out[:3] = 1.0
    assert out.isnan().tolist() == [False, False, False, True]


def test_memory_is_poisoned_before_the_first_test() -> None:
    # So that fixtures of wider scope than a test are covered too.
    assert AT_COLLECTION.isnan().all()


@pytest.mark.unpoisoned
def test_unpoisoned_leaves_memory_alone() -> None:
    assert not torch._C._get_deterministic_fill_uninitialized_memory()
    assert not torch.are_deterministic_algorithms_enabled()


def test_poison_is_back_after_an_unpoisoned_test() -> None:
    assert torch.empty(3).isnan().all()


def test_poison_adds_no_counted_operation() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            ops.append(str(func))
            return func(*args, **(kwargs or {}))

    ops: list[str] = []
    with Count():
        torch.empty(3)
    assert ops == ["aten.empty.memory_format"]


@pytest.mark.parametrize("again", [1, 2])
def test_each_test_starts_from_the_same_seed(again: int) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(torch.initial_seed()))
    assert torch.equal(torch.rand(3), expected)


def test_loading_conftest_does_not_import_triton() -> None:
    # Whoever imports Triton first decides whether its interpreter is used.
    code = """
import sys
import tests.conftest
assert 'torch' in sys.modules
sys.exit('triton' in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.gpu
def test_the_gpu_mark_means_a_gpu() -> None:
    assert torch.zeros(1, device="cuda").is_cuda


def test_mnist_root_is_a_copy_that_can_be_written(mnist_root: Path) -> None:
    raw = mnist_root / "MNIST" / "raw"
    assert len(list(raw.iterdir())) >= 4
    for path in raw.iterdir():
        assert path.stat().st_mode & 0o200
    (raw / "scribble").write_text("mine")
    (raw / "scribble").unlink()
