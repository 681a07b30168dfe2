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
from bench.bench_step import STILL, dense_step
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.pruning.shrink import plan_removal, remove_
from l0fast.training.models import build

DENSITIES = (1.0, 0.75, 0.5, 0.3, 0.1)
BATCHES = 8


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


class _Block(nn.Module):
    """Two convolutions and norms beside a stream."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


def _resnet(widths: Sequence[int]) -> nn.Module:
    """The first two stages of ResNet-18: two streams, and the widths inside of their blocks."""
    first, inner, second, deeper = widths
    return nn.Sequential(
        nn.Conv2d(3, first, 3, padding=1, bias=False),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        _Block(first, inner, first),
        _Block(first, inner, first),
        _Block(first, deeper, second),
        _Block(second, deeper, second),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 10),
    )


def _ffn(widths: Sequence[int]) -> nn.Module:
    outer, hidden = widths
    return nn.Sequential(nn.Linear(outer, hidden), nn.GELU(), nn.Linear(hidden, 256))


NETS = {
    "mlp": Net(_mlp, (784, 300, 100), (128, 1, 1, 784)),
    "lenet5": Net(_lenet, (20, 50, 500), (128, 1, 28, 28)),
    "convnet": Net(_convnet, (64, 128, 128), (32, 3, 16, 16)),
    "resnet": Net(_resnet, (64, 64, 128, 128), (32, 3, 16, 16)),
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
    return _steps(model, density)


def _steps(model: nn.Module, density: float) -> Callable[[Tensor, Tensor], None]:
    """Steps of a gated model whose gates stay where they are."""
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
    # A compacted model has fewer inputs.
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


LENET = (20, 50, 500)
AT_THE_END = {"conv1": 20, "conv2": 23, "fc1": 57, "fc2": 246}
"""LeNet's open gates after 200 epochs at 10 % of them; fc1's lie on the channels of conv2."""


def _settled(skip: str | bool, shrunk: bool = False) -> nn.Module:
    """LeNet with only those gates open, or with all others removed."""
    net = NETS["lenet5"]
    model, example = _place(net.make(LENET), net), _batch(net.shape)[:1]
    l0fast.sparsify_(model, example_inputs=example, skip=skip)
    kept: dict[str, Tensor] = {}
    for name, layer in gated_layers(model).items():
        opened = torch.arange(AT_THE_END[name])
        if name == "fc1":  # spread over the channels that are open
            reach = AT_THE_END["conv2"] * layer.num_gates // LENET[1]
            opened = opened * reach // len(opened)
        kept[name] = torch.zeros(layer.num_gates, dtype=torch.bool)
        kept[name][opened] = True
        with torch.no_grad():
            layer.log_alpha.copy_(torch.where(kept[name], 40.0, -40.0))
    if shrunk:
        removal, _ = plan_removal(model, Example.of(example), kept)
        assert removal is not None
        remove_(model, removal, Example.of(example), skip)
    return model


def at_the_end(name: str, effort: Effort) -> list[Row]:
    """A step of LeNet at the end of a training, with and without shrinking."""
    net = NETS["lenet5"]
    batches = [(_batch(net.shape), torch.randint(10, net.shape[:1])) for _ in range(BATCHES)]

    def gated(skip: str | bool, shrunk: bool = False) -> Call:
        return rotating(_steps(_settled(skip, shrunk), 0.1), batches)

    def plain(model: nn.Module) -> Call:
        return rotating(dense_step(_place(model, net), "cpu"), batches)

    def pruned() -> nn.Module:
        return l0fast.prune(_settled(False), example_inputs=batches[0][0][:1])

    variants = [
        Variant("dense", lambda: plain(net.make(LENET))),
        Variant("masked", lambda: gated(False)),
        Variant("skipped", lambda: gated("auto")),
        Variant("shrunk", lambda: gated("auto", shrunk=True)),
        Variant("pruned", lambda: plain(pruned())),
    ]
    return measure(name, "cpu", variants, effort, baseline="dense", count_ops=True)


def cases(quick: bool) -> list[Case]:
    """Five models at five densities (quick: at two), and LeNet's last steps, on the CPU."""
    found: list[Case] = []
    for model, net in NETS.items():
        for density in (1.0, 0.3) if quick else DENSITIES:
            name = f"skip/cpu/{model}/density-{density:g}"
            most = GOALS.get((model, density))
            found.append(Case(name, "cpu", functools.partial(_run, name, net, density, most)))
    name = "skip/cpu/lenet5/at-the-end"
    return [*found, Case(name, "cpu", functools.partial(at_the_end, name))]
