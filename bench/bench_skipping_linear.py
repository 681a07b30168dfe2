"""Linear chains that leave closed units out without asking which: forward and backward on a GPU.

The dense block runs on cuBLAS. The gates stay where they start, so that a case has one density. The
small model is timed as the trainer runs it: a whole step in one CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import l0fast
from bench import cuda
from bench.bench_skip import DENSITIES
from bench.bench_step import STILL, dense_step
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.training.models import build

FFN = (4096, 16384, 8192)
"""Width, hidden units, tokens."""
QUICK_FFN = (1024, 4096, 2048)
GOALS = {0.5: 1.5, 0.3: 2.3, 0.1: 5.0}
"""Density -> how many times faster than dense."""
MLP = (128, 1, 28, 28)
SETS = 2


def _block(
    sizes: tuple[int, int, int], density: float | None, skip: bool, device: str
) -> nn.Module:
    """Linear, GELU, Linear in bfloat16, with gates on the hidden units if a density is named."""
    width, hidden, _ = sizes
    block = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    block = block.to(device, torch.bfloat16).train()
    if density is not None:
        example = torch.randn(2, width, device=device, dtype=torch.bfloat16)
        # Inside a network, what the first layer reads has no gates.
        l0fast.sparsify_(
            block, exclude="0", density_init=density, example_inputs=example, skip=skip
        )
    return block


def _passes(block: nn.Module) -> Callable[[Tensor, Tensor], None]:
    def call(x: Tensor, dy: Tensor) -> None:
        block(x).backward(dy)
        block.zero_grad()
        x.grad = None

    return call


def ffn(
    name: str, sizes: tuple[int, int, int], density: float, effort: Effort, device: str = "cuda"
) -> list[Row]:
    """Forward and backward of an FFN block, all gradients included."""
    width, _, tokens = sizes
    graph = device == "cuda"  # as the trainer runs a step, without the host's time

    def tensor() -> Tensor:
        return torch.randn(tokens, width, device=device, dtype=torch.bfloat16)

    inputs = [(tensor().requires_grad_(), tensor()) for _ in range(SETS)]

    def variant(title: str, of: float | None, skip: bool = False) -> Variant:
        def make() -> Call:
            call = rotating(_passes(_block(sizes, of, skip, device)), inputs)
            return cuda.graphed(call, SETS) if graph else call

        return Variant(title, make, calls=SETS if graph else 1, graphed=graph)

    goals: list[Goal] = []
    if density in GOALS:
        faster = GOALS[density]
        goals = [Goal("skipped", 1 / faster, f">= {faster:g}x faster than dense", "dense")]
    variants = [
        variant("dense", None),
        variant("masked", density),
        variant("skipped", density, True),
    ]
    return measure(
        name, device, variants, effort, baseline="dense", goals=goals, count_launches=True
    )


def _mlp_step(density: float, skip: bool) -> Callable[[Tensor, Tensor], None]:
    model = build("mlp", MLP[1:], 10).to("cuda").train()
    example = torch.randn(2, *MLP[1:], device="cuda")
    l0fast.sparsify_(model, density_init=density, example_inputs=example, skip=skip)
    constraint = l0fast.DensityConstraint(model, target=density)
    groups: Any = l0fast.param_groups(model, lr=7e-4, gate_lr=STILL)
    adam = torch.optim.Adam(groups, fused=True, capturable=True)

    def step(x: Tensor, y: Tensor) -> None:
        (torch.nn.functional.cross_entropy(model(x), y) + constraint()).backward()
        adam.step()
        adam.zero_grad()
        constraint.step()

    return step


def mlp(name: str, density: float, effort: Effort) -> list[Row]:
    """The whole step of the MLP in one CUDA graph; its kernels are counted."""
    x, y = torch.randn(MLP, device="cuda"), torch.randint(10, MLP[:1], device="cuda")

    def replayed(step: Callable[[Tensor, Tensor], None]) -> Call:
        return cuda.graphed(lambda: step(x, y))

    def dense() -> Call:
        model = build("mlp", MLP[1:], 10).to("cuda").train()
        return replayed(dense_step(model, "cuda"))

    variants = [
        Variant("dense", dense, graphed=True),
        Variant("masked", lambda: replayed(_mlp_step(density, False)), graphed=True),
        Variant("skipped", lambda: replayed(_mlp_step(density, True)), graphed=True),
    ]
    goals = [
        Goal("masked", 1.2, "<= 1.2x the dense graph", "dense"),
        Goal("masked", 20, "<= 20 kernels", count="launches"),
    ]
    return measure(
        name, "cuda", variants, effort, baseline="dense", goals=goals, count_launches=True
    )


def cases(quick: bool) -> list[Case]:
    """The FFN block at five densities (quick: smaller, at two), and the MLP, on a GPU."""
    sizes = QUICK_FFN if quick else FFN
    found: list[Case] = []
    for density in (1.0, 0.3) if quick else DENSITIES:
        name = f"skipping_linear/cuda/ffn/density-{density:g}"
        found.append(Case(name, "cuda", functools.partial(ffn, name, sizes, density)))
    name = "skipping_linear/cuda/mlp/density-0.3"
    found.append(Case(name, "cuda", functools.partial(mlp, name, 0.3)))
    return found
