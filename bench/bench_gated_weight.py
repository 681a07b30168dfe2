"""gated_weight: a gate for each single weight, in one pass each way.

Bytes an element: forward reads w and log_alpha and writes w * z; backward reads the gradient, w and
log_alpha and writes two gradients. On a GPU every variant is timed beside a copy of as many bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import cuda, published
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast import functional

PASSES = ("forward", "backward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_EXPONENTS = (26, 28, 22, 24, 20)
QUICK_EXPONENTS = (22, 26)
CPU_SIZES = {"mlp": 784 * 300 + 300 * 100 + 100 * 10, "2^20": 2**20}
GRAPHED_BELOW = 2**26
"""Smaller calls end before the host has launched the next: they are replayed from a graph."""

Op = Callable[[Tensor, Tensor], Any]


def bytes_per_element(dtype: torch.dtype, which: str) -> int:
    """The fewest bytes that a pass moves: weights and gradients in `dtype`, log_alpha and its
    gradient in fp32."""
    wide = dtype.itemsize
    forward, backward = wide + 4 + wide, wide + wide + 4 + wide + 4
    return {"forward": forward, "backward": backward}.get(which, forward + backward)


def _operands(n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, log_alpha, and the gradients of both results), all random."""
    weight = torch.randn(n, device=device).to(dtype).requires_grad_()
    log_alpha = torch.randn(n, device=device).requires_grad_()
    return weight, log_alpha, torch.randn(n, device=device).to(dtype), torch.rand((), device=device)


def _call(op: Op, which: str, operands: list[tuple[Tensor, ...]]) -> Call:
    def forward(weight: Tensor, log_alpha: Tensor, *_: Tensor) -> object:
        with torch.no_grad():
            return op(weight, log_alpha)

    def both(weight: Tensor, log_alpha: Tensor, *gradients: Tensor) -> object:
        results = tuple(op(weight, log_alpha))
        return torch.autograd.grad(results, (weight, log_alpha), gradients)

    def backward(results: tuple[Tensor, ...], *rest: Tensor) -> object:
        weight, log_alpha, *gradients = rest
        inputs = (weight, log_alpha)
        return torch.autograd.grad(results, inputs, gradients, retain_graph=True)

    if which == "forward":
        return rotating(forward, operands)
    if which == "backward":
        ready = [(tuple(op(*one[:2])), *one) for one in operands]
        return rotating(backward, ready)
    return rotating(both, operands)


def _run(
    name: str, n: int, dtype: torch.dtype, which: str, device: str, effort: Effort
) -> list[Row]:
    moved = n * bytes_per_element(dtype, which)
    on_gpu = device == "cuda"
    sets = cuda.sets_beyond_cache(moved) if on_gpu else 4
    graph = on_gpu and n < GRAPHED_BELOW

    @functools.cache
    def operands() -> list[tuple[Tensor, ...]]:
        return [_operands(n, dtype, device) for _ in range(sets)]

    def build(make: Callable[[], Call]) -> Call:
        call = make()
        return cuda.graphed(call, sets) if graph else call

    def variant(title: str, make: Callable[[], Call], compiled: bool = False) -> Variant:
        calls = sets if graph else 1
        return Variant(title, lambda: build(make), calls=calls, graphed=graph, compiled=compiled)

    def compiled() -> Call:
        torch._dynamo.reset()  # for these shapes alone
        return _call(torch.compile(published.gated_weight, dynamic=False), which, operands())

    def copying() -> Call:
        return cuda.copying(moved, sets)

    variants: list[Variant] = []
    if on_gpu:
        variants.append(variant("copy", copying))
    variants += [
        variant("published, eager", lambda: _call(published.gated_weight, which, operands())),
        variant("l0fast", lambda: _call(functional.gated_weight, which, operands())),
    ]
    if which != "backward" and not effort.quick:
        variants.insert(-1, variant("published, torch.compile", compiled, compiled=True))
    return measure(
        name,
        device,
        variants,
        effort,
        baseline="copy" if on_gpu else "published, eager",
        goals=_goals(n, dtype, which) if on_gpu else [],
        bytes_moved=moved,
    )


def _goals(n: int, dtype: torch.dtype, which: str) -> list[Goal]:
    """PERFORMANCE's goals, which are for sizes that fill the chip."""
    if n < 2**26:
        return []
    wide = dtype == torch.float32
    if which == "forward+backward":
        eager, compiled = (6.0, 1.3) if wide else (8.0, 1.55)
        return [
            Goal("l0fast", 1 / eager, f">= {eager:g}x faster than eager", "published, eager"),
            Goal(
                "l0fast",
                1 / compiled,
                f">= {compiled:g}x faster than compiled",
                "published, torch.compile",
            ),
        ]
    percent = 80 if which == "forward" and not wide else 90
    return [Goal("l0fast", 100 / percent, f">= {percent} % of the copy's rate", "copy")]


def cases(quick: bool) -> list[Case]:
    """CPU: the MLP's weights, and a million; GPU: 2^20 to 2^28 weights."""
    found: list[Case] = []
    for size, n in CPU_SIZES.items():
        name = f"gated_weight/cpu/fp32/forward+backward/{size}"
        run = functools.partial(_run, name, n, torch.float32, "forward+backward", "cpu")
        found.append(Case(name, "cpu", run))
    exponents = QUICK_EXPONENTS if quick else GPU_EXPONENTS
    for exponent, (label, dtype), which in itertools.product(exponents, DTYPES.items(), PASSES):
        name = f"gated_weight/cuda/{label}/{which}/2^{exponent}"
        run = functools.partial(_run, name, 2**exponent, dtype, which, "cuda")
        found.append(Case(name, "cuda", run))
    return found
