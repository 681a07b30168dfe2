"""Whole training steps: forward, loss, constraint, backward, optimizer, multiplier.

Dense, l0fast and the plain step use the same fused Adam; the published step uses Adam as it comes,
as its code does. Masked layers do all the dense work; nothing is skipped but where a row says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0fast
from bench import cuda, networks, published
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.training.models import build

TARGET = 0.33
BATCHES = 8
STILL = 1e-9
"""Learning rate of gates that stay where they start."""

Batch = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor], None]


def _place(model: nn.Module, device: str) -> nn.Module:
    """Moves a model or batch to the device, images with channels last, as the trainer does."""
    return model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]


def _batches(shape: tuple[int, ...], classes: int, device: str, count: int) -> list[Batch]:
    found: list[Batch] = []
    for _ in range(count):
        x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
        found.append((x, torch.randint(classes, shape[:1], device=device)))
    return found


def _adam(groups: Any, device: str) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=7e-4, fused=True, capturable=device == "cuda")


def _autocast(on: bool, device: str) -> AbstractContextManager[object]:
    # Its cache of cast weights would outlive a captured graph.
    return torch.autocast(device, torch.bfloat16, cache_enabled=False) if on else nullcontext()


def dense_step(model: nn.Module, device: str, autocast: bool = False) -> Step:
    """An ordinary step."""
    adam = _adam(model.parameters(), device)

    def step(x: Tensor, y: Tensor) -> None:
        with _autocast(autocast, device):
            output = model(x)
        F.cross_entropy(output.float(), y).backward()
        adam.step()
        adam.zero_grad()

    return step


def l0fast_step(
    model: nn.Module,
    device: str,
    gates: str = "auto",
    density: float | None = None,
    autocast: bool = False,
    example: Tensor | None = None,
    skip: bool = False,
) -> Step:
    """The two lines more: the constraint's call in the loss, and its step.

    Where a density is named, the gates stay there.
    """
    l0fast.sparsify_(model, gates=gates, density_init=density, example_inputs=example, skip=skip)
    constraint = l0fast.DensityConstraint(model, target=density or TARGET)
    gate_lr = None if density is None else STILL
    adam = _adam(l0fast.param_groups(model, lr=7e-4, gate_lr=gate_lr), device)

    def step(x: Tensor, y: Tensor) -> None:
        with _autocast(autocast, device):
            output = model(x)
        (F.cross_entropy(output.float(), y) + constraint()).backward()
        adam.step()
        adam.zero_grad()
        constraint.step()

    return step


def _small(name: str, model: str, device: str, effort: Effort) -> list[Row]:
    """MLP 784-300-100 and LeNet 20-50-800-500, batch 128, float32."""
    shape = (128, 1, 28, 28)
    batches = _batches(shape, 10, device, BATCHES)

    def fresh() -> nn.Module:
        return _place(build(model, shape[1:], 10), device)

    def call(step: Step) -> Call:
        return rotating(step, batches)

    def publish(gates: str) -> nn.Module:
        return published.publish_(fresh(), gates)

    def replayed(step: Step) -> Call:
        # A captured graph goes on reading the batch it was captured with.
        return cuda.graphed(lambda: step(*batches[0]))

    makes: dict[str, Callable[[], Call]] = {
        "dense": lambda: call(dense_step(fresh(), device)),
        "published, structured": lambda: call(
            published.published_step(publish("structured"), TARGET)
        ),
        "published, unstructured": lambda: call(
            published.published_step(publish("unstructured"), TARGET)
        ),
        "plain, structured": lambda: call(published.plain_step(publish("structured"), TARGET)),
        "l0fast, structured": lambda: call(l0fast_step(fresh(), device)),
        "l0fast, unstructured": lambda: call(l0fast_step(fresh(), device, "weight")),
    }
    variants = [Variant(title, make) for title, make in makes.items()]
    if not effort.quick:

        def compiled() -> Call:
            torch._dynamo.reset()
            return call(published.plain_step(publish("structured"), TARGET, compiled=True))

        variants.insert(4, Variant("plain, torch.compile", compiled, compiled=True))
    ours = "l0fast, structured"
    most = 1.2 if model == "mlp" else 1.05
    goals = [
        Goal(ours, 0, "no .item()", count="items"),
        Goal(ours, most, f"<= {most:g}x dense", "dense"),
    ]
    if model == "mlp":
        half = ">= 2x faster than published"
        goals.append(Goal(ours, 68, "<= 68 ops", count="ops"))
        goals.append(Goal(ours, 0.5, half, "published, structured"))
    if device == "cuda":
        # Eager steps of this size wait for the host, so the goals are for graphs.
        goals = [goal for goal in goals if goal.count is not None]
        pair = ("dense, CUDA graph", "l0fast, CUDA graph")
        variants += [
            Variant(pair[0], lambda: replayed(dense_step(fresh(), device)), graphed=True),
            Variant(pair[1], lambda: replayed(l0fast_step(fresh(), device)), graphed=True),
        ]
        goals.append(Goal(pair[1], most, f"<= {most:g}x the dense graph", pair[0]))
        if model == "mlp":
            goals.append(Goal(pair[1], 20, "<= 20 kernels", count="launches"))
    return measure(
        name,
        device,
        variants,
        effort,
        baseline="dense",
        goals=goals,
        count_ops=True,
        count_launches=True,
    )


def _large(
    name: str,
    build_model: Callable[[], nn.Module],
    shape: tuple[int, ...],
    density: float,
    effort: Effort,
    device: str = "cuda",
) -> list[Row]:
    """Large models in bf16: the cost of open gates, or the savings of closed ones."""
    batches = _batches(shape, 10, device, 2)

    def fresh() -> nn.Module:
        return _place(build_model(), device)

    def dense() -> Step:
        return dense_step(fresh(), device, autocast=True)

    def ours(skip: bool = False) -> Step:
        # With an example gates go by the structure: streams, heads, hidden units.
        example = batches[0][0][:2]
        options: dict[str, Any] = {"autocast": True, "example": example, "skip": skip}
        return l0fast_step(fresh(), device, density=density, **options)

    def replayed(step: Step) -> Call:
        return cuda.graphed(lambda: step(*batches[0]))

    plain, graph = "l0fast, structured", "l0fast, CUDA graph"
    variants = [
        Variant("dense", lambda: rotating(dense(), batches)),
        Variant(plain, lambda: rotating(ours(), batches)),
    ]
    goals: list[Goal] = []
    if density < 1:
        variants.append(Variant("l0fast, skipped", lambda: rotating(ours(skip=True), batches)))
    else:
        goals.append(Goal(plain, 1.03, "<= 1.03x dense", "dense"))
    if density == 1 and device == "cuda":
        pair = ("dense, CUDA graph", graph)
        variants += [
            Variant(pair[0], lambda: replayed(dense()), graphed=True),
            Variant(pair[1], lambda: replayed(ours()), graphed=True),
        ]
        goals.append(Goal(graph, 1.03, "<= 1.03x dense", pair[0]))
    return measure(
        name,
        device,
        variants,
        effort,
        baseline="dense",
        goals=goals,
        count_launches=True,
    )


def cases(quick: bool) -> list[Case]:
    """The two small models on both; ResNet-50, WRN-28-10 and ViT-B/16 on a GPU."""
    found: list[Case] = []
    for device in ("cpu", "cuda"):
        for model in ("mlp", "lenet5"):
            name = f"step/{device}/{model}"
            found.append(Case(name, device, functools.partial(_small, name, model, device)))
    large: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "resnet50": (networks.resnet50, (16 if quick else 64, 3, 224, 224)),
        "wrn28-10": (networks.wrn28_10, (32 if quick else 128, 3, 32, 32)),
        "vit-b16": (networks.vit_b16, (16 if quick else 64, 3, 224, 224)),
    }
    # The goals are at density 1: those first.
    for density in (1.0, 0.3):
        for model, (make, shape) in large.items():
            name = f"step/cuda/{model}" + (f"/density-{density:g}" if density < 1 else "")
            run = functools.partial(_large, name, make, shape, density)
            found.append(Case(name, "cuda", run))
    return found
