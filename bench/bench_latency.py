"""What a latency table foretells, against what the pruned model takes; and what the memory of
activations is a measure of, against what autograd keeps."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import l0fast
from bench.case import Case, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.layers.handle import gated_layers
from l0fast.training.models import build

DENSITIES = (0.75, 0.5, 0.25)
"""Shares of each layer's gates that stay."""
DENSE = "dense"


def conv_net() -> nn.Sequential:
    """[N, 3, 32, 32] -> [N, 10]: 3x3 convolutions 64-128-128 with batch norms."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 64), (64, 128), (128, 128)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    layers[6:6] = [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: build("mlp", (1, 28, 28), 10), (128, 1, 28, 28)),
    "lenet5": (lambda: build("lenet5", (1, 28, 28), 10), (128, 1, 28, 28)),
    "conv-net": (conv_net, (32, 3, 32, 32)),
}


def kept_by_autograd(model: nn.Module, x: Tensor) -> int:
    """Bytes of the tensors that a backward reads, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in own)


def _run(name: str, model: str, effort: Effort) -> list[Row]:
    torch.manual_seed(0)  # the same shapes in every run
    make, shape = MODELS[model]
    x = torch.randn(shape)
    dense = make().eval()
    gated = l0fast.sparsify_(make(), example_inputs=x).eval()
    table = l0fast.measure_latency(gated, x)

    def call(module: nn.Module) -> Callable[[], Call]:
        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                return module(x)

        return lambda: rotating(forward, [(x,)])

    variants = [Variant(DENSE, call(dense))]
    foretold: dict[str, float] = {}
    notes: dict[str, str] = {}
    before = kept_by_autograd(dense, x)
    for density in DENSITIES:
        with torch.no_grad():
            for layer in gated_layers(gated).values():
                closed = torch.randperm(layer.num_gates)[round(density * layer.num_gates) :]
                layer.log_alpha.fill_(5.0)
                layer.log_alpha[closed] = -5.0
        small = l0fast.prune(gated, x, 1.0, measure=table)
        report: Any = small.report
        title = f"pruned to density {density:g}"
        variants.append(Variant(title, call(small)))
        (group,) = report.groups.values()
        foretold[title] = 1e3 * group["kept"]
        foretold[DENSE] = 1e3 * group["total"]
        memory = report.memory[0] / report.memory[1]
        by_autograd = kept_by_autograd(small, x) / before
        notes[title] = (
            f"; kept {report.architecture}; activations {memory:.1%} by the measure, "
            f"{by_autograd:.1%} by autograd"
        )
    rows = measure(name, "cpu", variants, effort, baseline=DENSE)
    return [
        dataclasses.replace(
            row,
            note=f"the table says {foretold[row.variant]:.4g} ms, "
            f"{foretold[row.variant] / foretold[DENSE]:.3f} of dense" + notes.get(row.variant, ""),
        )
        for row in rows
    ]


def cases(quick: bool) -> list[Case]:
    """Inference; on a CPU."""
    del quick
    names = {f"latency/cpu/{model}": model for model in MODELS}
    return [
        Case(name, "cpu", functools.partial(_run, name, model)) for name, model in names.items()
    ]
