"""A pruned model against one written by hand in the same shape, and against the dense original."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import l0fast
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.draw import gated_layers
from l0fast.models import build

SHAPE = (1, 28, 28)
BATCHES = 4
OPEN = 0.5
"""Share of each layer's gates that stay."""


class Take(nn.Module):
    """The inputs that a model written by hand reads, of those that arrive."""

    index: Tensor

    def __init__(self, index: Tensor) -> None:
        super().__init__()
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


def _half_closed(model: nn.Module) -> None:
    """Closes a random part of every layer's gates for good, and opens the others."""
    with torch.no_grad():
        for layer in gated_layers(model).values():
            closed = torch.randperm(layer.num_gates)[round(OPEN * layer.num_gates) :]
            layer.log_alpha.fill_(5.0)
            layer.log_alpha[closed] = -5.0


def _as_pruned(small: nn.Module) -> nn.Sequential:
    """What a user writes who knows which units are kept, with the pruned model's weights."""
    parts: list[nn.Module] = []
    for module in small.modules():
        if isinstance(module, nn.Linear):
            layer: nn.Module = nn.Linear(module.in_features, module.out_features)
        elif isinstance(module, nn.Conv2d):
            kernel: Any = module.kernel_size
            layer = nn.Conv2d(module.in_channels, module.out_channels, kernel)
        elif isinstance(module, nn.MaxPool2d):
            layer = nn.MaxPool2d(module.kernel_size)
        elif isinstance(module, (nn.ReLU, nn.Flatten)):
            layer = type(module)()
        elif "index" in module._buffers:
            layer = Take(module.get_buffer("index").clone())
        else:
            continue
        if not isinstance(layer, Take):
            layer.load_state_dict(module.state_dict())
        parts.append(layer)
    return nn.Sequential(*parts)


def _run(
    name: str, model: str, exclude: str | None, batch: int, device: str, effort: Effort
) -> list[Row]:
    torch.manual_seed(0)  # the same shapes in every run
    dense = build(model, SHAPE, 10).eval()
    gated = l0fast.sparsify_(build(model, SHAPE, 10), exclude=exclude)
    _half_closed(gated)
    small = l0fast.prune(gated, torch.randn(2, *SHAPE)).eval()
    by_hand = _as_pruned(small).eval()
    inputs = [(torch.randn(batch, *SHAPE, device=device),) for _ in range(BATCHES)]
    with torch.no_grad():
        x = inputs[0][0].cpu()
        torch.testing.assert_close(by_hand(x), small(x))  # else they are not the same work
    report: Any = small.report

    def call(module: nn.Module) -> Callable[[], Call]:
        module.to(device)

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                return module(x)

        return lambda: rotating(forward, inputs)

    note = f"kept {report['architecture']}"
    return measure(
        name,
        device,
        [
            Variant("dense original", call(dense)),
            Variant("by hand", call(by_hand), note=note),
            Variant("pruned by l0fast", call(small), note=note),
        ],
        effort,
        baseline="by hand",
        goals=[Goal("pruned by l0fast", 1.02, "<= 1.02x by hand", "by hand")],
    )


def cases(quick: bool) -> list[Case]:
    """Inference at batch 128 and 1; "hidden" leaves the pixels whole, so nothing is gathered."""
    del quick
    found: list[Case] = []
    for model, exclude, label in (
        ("mlp", "fc1", "mlp-hidden"),
        ("mlp", None, "mlp"),
        ("lenet5", None, "lenet5"),
    ):
        for batch in (128, 1):
            name = f"prune/cpu/{label}/batch-{batch}"
            run = functools.partial(_run, name, model, exclude, batch, "cpu")
            found.append(Case(name, "cpu", run))
    return found
