"""Training steps against density: dense, masked, skipped, and dense at the compacted size.

The gates stay where they start (their learning rate is next to nothing), so that a case has one
density. "compacted" is what a step would cost with the closed units gone for good.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import l0fast
from bench.bench_step import dense_step
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.training.models import build

DENSITIES = (1.0, 0.75, 0.5, 0.3, 0.1)
BATCHES = 8
STILL = 1e-9
"""Learning rate of the gates."""


@dataclass(frozen=True)
class Net:
    """A model whose hidden widths, and inputs where they are gated, can be chosen."""

    make: Callable[[Sequence[int]], nn.Module]
    widths: tuple[int, ...]
    shape: tuple[int, ...]
    classes: int = 10


def _mlp(widths: Sequence[int]) -> nn.Module:
    return build("mlp", (1, 1, widths[0]), 10, widths[1:])


def _lenet(widths: Sequence[int]) -> nn.Module:
    return build("lenet5", (1, 28, 28), 10, widths)


def _convnet(widths: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for inner, outer in pairwise((3, *widths)):
        layers += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def _ffn(widths: Sequence[int]) -> nn.Module:
    outer, hidden = widths
    return nn.Sequential(nn.Linear(outer, hidden), nn.GELU(), nn.Linear(hidden, 256))


NETS = {
    "mlp": Net(_mlp, (784, 300, 100), (128, 1, 1, 784)),
    "lenet5": Net(_lenet, (20, 50, 500), (128, 1, 28, 28)),
    "convnet": Net(_convnet, (64, 128, 128), (32, 3, 16, 16)),
    "ffn": Net(_ffn, (256, 1024), (512, 256), 256),
}
GOALS = {("mlp", 0.3): 0.5, ("lenet5", 0.3): 0.35}


def _place(model: nn.Module, net: Net) -> nn.Module:
    if len(net.shape) == 4:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.train()


def _batch(shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def _step(net: Net, density: float, skip: str | bool) -> Callable[[Tensor, Tensor], None]:
    model = _place(net.make(net.widths), net)
    l0fast.sparsify_(model, density_init=density, example_inputs=_batch(net.shape)[:2], skip=skip)
    constraint = l0fast.DensityConstraint(model, target=density)
    groups = l0fast.param_groups(model, lr=7e-4, gate_lr=STILL)
    adam = torch.optim.Adam(groups, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        (F.cross_entropy(model(x), y) + constraint()).backward()
        adam.step()
        adam.zero_grad()
        constraint.step()

    return step


def _run(name: str, net: Net, density: float, most: float | None, effort: Effort) -> list[Row]:
    batches = [
        (_batch(net.shape), torch.randint(net.classes, net.shape[:1])) for _ in range(BATCHES)
    ]
    small = [max(round(density * width), 1) for width in net.widths]
    # Fewer inputs arrive, where a compacted model has fewer.
    fewer = net.shape
    if net.make in (_mlp, _ffn):
        fewer = (*net.shape[:-1], small[0])
    compacted = [(_batch(fewer), y) for _, y in batches]

    def dense(widths: Sequence[int], inputs: list[tuple[Tensor, Tensor]]) -> Call:
        return rotating(dense_step(_place(net.make(widths), net), "cpu"), inputs)

    goals = [Goal("skipped", 1.05, "<= 1.05x masked", "masked")]
    if most is not None:
        goals.append(Goal("skipped", most, f"<= {most:g}x dense", "dense"))
    return measure(
        name,
        "cpu",
        [
            Variant("dense", lambda: dense(net.widths, batches)),
            Variant("masked", lambda: rotating(_step(net, density, False), batches)),
            Variant("skipped", lambda: rotating(_step(net, density, "auto"), batches)),
            Variant("compacted", lambda: dense(small, compacted)),
        ],
        effort,
        baseline="dense",
        goals=goals,
        count_ops=True,
    )


def cases(quick: bool) -> list[Case]:
    """Four models at five densities (quick: at two), on the CPU."""
    found: list[Case] = []
    for model, net in NETS.items():
        for density in (1.0, 0.3) if quick else DENSITIES:
            name = f"skip/cpu/{model}/density-{density:g}"
            most = GOALS.get((model, density))
            found.append(Case(name, "cpu", functools.partial(_run, name, net, density, most)))
    return found
