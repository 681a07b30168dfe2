"""What code would launch on a GPU, counted without one: in Triton's interpreter."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from l0fast.autograd import direct
from tests.helpers.counting import Counting


@contextlib.contextmanager
def _taken_for_a_gpu() -> Generator[None]:
    """Kernels are chosen as on a GPU for tensors on the CPU, whoever looks at the operations."""
    from l0fast_kernels import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
        patch.setattr(direct, "is_possible", lambda: True)
        patch.setattr(launch, "on", lambda tensor: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        yield


def launches_as_on_a_gpu(step: Callable[[], None]) -> Counter[str]:
    """The operations of a step that compute, and the kernels, by their names. Each of them is one
    launch on a GPU, whose second step it would be."""
    from l0fast_kernels.launch import Launch

    run, found = Launch.__call__, Counter[str]()

    def counted(one: Launch, *tensors: Any, **numbers: Any) -> None:
        found[one.kernel.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter computes by operations, too
            run(one, *tensors, **numbers)

    with _taken_for_a_gpu(), pytest.MonkeyPatch.context() as patch:
        step()  # makes what is kept
        patch.setattr(Launch, "__call__", counted)
        with Counting() as counting:
            step()
    of_torch = {name: n for name, n in counting.work.items() if "record_function" not in name}
    return found + Counter(of_torch)
