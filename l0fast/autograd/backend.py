"""The choice between the kernels and the reference. Triton is imported when a kernel first runs."""

from __future__ import annotations

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from l0fast import _checks

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("triton", "l0fast_kernels"))


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_on_triton(backend: str, log_alpha: Tensor, weight: Tensor | None = None) -> bool:
    """Whether a call's kernels run: "auto" where they can, "triton" always.

    Raises:
        ValueError: "triton", and they cannot.
    """
    if backend == "torch" or (backend == "auto" and not log_alpha.is_cuda):
        return False
    reachable = log_alpha.is_cuda or _interpreting()
    supported = log_alpha.dtype != torch.float64
    if weight is not None:
        supported = supported and weight.dtype in WEIGHT_DTYPES
    if _installed() and reachable and supported:
        return True
    if backend == "auto":
        return False
    if not _installed():
        expected = "Triton and l0fast_kernels to be installed, or 'torch'"
    elif reachable:
        expected = "float32, bfloat16 or float16 tensors, or 'torch'"
    elif torch.cuda.is_available():
        expected = f"tensors on a GPU (they are on {log_alpha.device}), or 'torch'"
    else:
        expected = "a machine with a GPU (this one has none), or 'torch'"
    _checks.refuse("backend", backend, expected)


def masks_on_triton(weight: Tensor, z: Tensor) -> bool:
    """Whether the kernel masks a layer's weight: in a step of training, where one launch masks,
    casts under autocast, and another gives both gradients."""
    if not (weight.is_cuda and torch.is_grad_enabled() and z.requires_grad):
        return False
    return weight.dtype == z.dtype == torch.float32 and runs_on_triton("auto", z, weight)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The kernels, if they run on this tensor's device."""
    if tensor.is_cuda or _interpreting():
        import l0fast_kernels

        return l0fast_kernels
    return None
