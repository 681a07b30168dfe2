"""scaled_weight: a gate for each row or column of a weight, in one pass each way.

Bytes an element: forward reads w and writes w * z; backward reads the gradient and w, and writes a
gradient. The gates are few. On a GPU every variant is timed beside a copy of as many bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from bench import cuda
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast import functional

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DIMS = {"rows": 0, "columns": 1}
CPU_SHAPE, GPU_SHAPE, QUICK_SHAPE = (300, 784), (16384, 8192), (4096, 2048)

Op = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def bytes_per_element(dtype: torch.dtype) -> int:
    """The fewest bytes that both passes move: two weights forward, three backward."""
    return 5 * dtype.itemsize


def by_autograd(weight: Tensor, log_alpha: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The same gates by plain PyTorch: autograd differentiates the product."""
    z, expected_open = functional.hard_concrete(log_alpha)
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    return weight * z.view(shape).to(weight.dtype), expected_open


def ours(weight: Tensor, log_alpha: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return functional.gated_weight(weight, log_alpha, dim=dim)


def _call(op: Op, dim: int, operands: list[tuple[Tensor, ...]]) -> Call:
    def both(weight: Tensor, log_alpha: Tensor, dmasked: Tensor, dopen: Tensor) -> object:
        masked, expected_open = op(weight, log_alpha, dim)
        results = masked, expected_open.sum()
        return torch.autograd.grad(results, (weight, log_alpha), (dmasked, dopen))

    return rotating(both, operands)


def _run(
    name: str, shape: tuple[int, int], dim: int, dtype: torch.dtype, device: str, effort: Effort
) -> list[Row]:
    on_gpu = device == "cuda"
    moved = shape[0] * shape[1] * bytes_per_element(dtype)
    sets = cuda.sets_beyond_cache(moved) if on_gpu else 4

    @functools.cache
    def operands() -> list[tuple[Tensor, ...]]:
        return [
            (
                torch.randn(shape, device=device).to(dtype).requires_grad_(),
                torch.randn(shape[dim], device=device).requires_grad_(),
                torch.randn(shape, device=device).to(dtype),
                torch.rand((), device=device),
            )
            for _ in range(sets)
        ]

    variants = [
        Variant("by autograd", lambda: _call(by_autograd, dim, operands())),
        Variant("l0fast", lambda: _call(ours, dim, operands())),
    ]
    if on_gpu:
        variants.insert(0, Variant("copy", lambda: cuda.copying(moved, sets)))
    return measure(
        name,
        device,
        variants,
        effort,
        baseline="copy" if on_gpu else "by autograd",
        goals=[Goal("l0fast", 100 / 80, ">= 80 % of the copy's rate", "copy")] if on_gpu else [],
        bytes_moved=moved,
    )


def cases(quick: bool) -> list[Case]:
    """CPU: the MLP's first layer; GPU: a weight that fills the chip, or a smaller one."""
    found: list[Case] = []
    for label, dim in DIMS.items():
        name = f"scaled_weight/cpu/fp32/{label}"
        run = functools.partial(_run, name, CPU_SHAPE, dim, torch.float32, "cpu")
        found.append(Case(name, "cpu", run))
    shape = QUICK_SHAPE if quick else GPU_SHAPE
    for (dtype_label, dtype), (label, dim) in itertools.product(DTYPES.items(), DIMS.items()):
        name = f"scaled_weight/cuda/{dtype_label}/{label}"
        run = functools.partial(_run, name, shape, dim, dtype, "cuda")
        found.append(Case(name, "cuda", run))
    return found
