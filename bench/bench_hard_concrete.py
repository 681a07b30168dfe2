"""hard_concrete: the gates of all layers of a model, in one launch each way."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench import networks, published
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast import functional

SETS = 4


def _models() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        resnet = networks.gate_counts(networks.resnet50())
    return {"mlp": (784, 300, 100), "resnet50": resnet, "vit-b": networks.vit_b_gate_counts()}


def _ours(sizes: tuple[int, ...], device: str, which: str) -> Call:
    def results(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
        return functional.hard_concrete(log_alpha, sizes)

    def forward(log_alpha: Tensor, *_: Tensor) -> object:
        with torch.no_grad():
            return results(log_alpha)

    def both(log_alpha: Tensor, *gradients: Tensor) -> object:
        return torch.autograd.grad(results(log_alpha), log_alpha, gradients)

    def backward(drawn: tuple[Tensor, Tensor], log_alpha: Tensor, *gradients: Tensor) -> object:
        return torch.autograd.grad(drawn, log_alpha, gradients, retain_graph=True)

    n = sum(sizes)
    operands = [
        (
            torch.randn(n, device=device).requires_grad_(),
            torch.randn(n, device=device),
            torch.rand(len(sizes), device=device),
        )
        for _ in range(SETS)
    ]
    if which == "backward":
        return rotating(backward, [(results(one[0]), *one) for one in operands])
    return rotating(forward if which == "forward" else both, operands)


def _published(sizes: tuple[int, ...], device: str, which: str) -> Call:
    def results(log_alphas: list[Tensor]) -> list[Tensor]:
        z, expected_open = published.hard_concrete(log_alphas)
        return z + expected_open

    def forward(log_alphas: list[Tensor], _: list[Tensor]) -> object:
        with torch.no_grad():
            return results(log_alphas)

    def both(log_alphas: list[Tensor], gradients: list[Tensor]) -> object:
        return torch.autograd.grad(results(log_alphas), log_alphas, gradients)

    def backward(drawn: list[Tensor], log_alphas: list[Tensor], gradients: list[Tensor]) -> object:
        return torch.autograd.grad(drawn, log_alphas, gradients, retain_graph=True)

    def operands() -> tuple[list[Tensor], list[Tensor]]:
        log_alphas = [torch.randn(n, device=device).requires_grad_() for n in sizes]
        of_z = [torch.randn(n, device=device) for n in sizes]
        return log_alphas, of_z + [torch.rand((), device=device) for _ in sizes]

    every = [operands() for _ in range(SETS)]
    if which == "backward":
        return rotating(backward, [(results(one[0]), *one) for one in every])
    return rotating(forward if which == "forward" else both, every)


def _run(name: str, sizes: tuple[int, ...], which: str, device: str, effort: Effort) -> list[Row]:
    def variant(title: str, make: Callable[[tuple[int, ...], str, str], Call]) -> Variant:
        note = f"{sum(sizes)} gates, {len(sizes)} layers"
        return Variant(title, lambda: make(sizes, device, which), note=note)

    goals: list[Goal] = []
    if device == "cuda" and which != "forward+backward":
        goals.append(Goal("l0fast, one draw", 1, "1 launch", count="launches"))
    return measure(
        name,
        device,
        [variant("published, by layer", _published), variant("l0fast, one draw", _ours)],
        effort,
        baseline="published, by layer",
        goals=goals,
        count_ops=which == "forward+backward",
        count_launches=True,
    )


def cases(quick: bool) -> list[Case]:
    """Forward and backward together on both; each alone on a GPU, for its launches."""
    del quick
    found: list[Case] = []
    for device, passes in (
        ("cpu", ("forward+backward",)),
        ("cuda", ("forward", "backward", "forward+backward")),
    ):
        for model, sizes in _models().items():
            for which in passes:
                name = f"hard_concrete/{device}/{model}/{which}"
                run = functools.partial(_run, name, sizes, which, device)
                found.append(Case(name, device, run))
    return found
