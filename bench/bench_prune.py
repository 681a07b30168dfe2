"""A pruned model against one written by hand in the same shape, and against the dense original."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import l0fast
from bench.case import Case, Goal, Variant, measure
from bench.report import Row
from bench.timing import Call, Effort, rotating
from l0fast.layers.handle import gated_layers
from l0fast.training.models import build

SHAPE = (1, 28, 28)
BATCHES = 4
OPEN = 0.5
"""Share of each layer's gates that stay."""


class Take(nn.Module):
    """Picks the inputs that a model written by hand reads."""

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
    """The model that a user would write by hand for the kept units, with the pruned weights."""
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


def _fresh(layer: Any) -> nn.Module:
    """A new layer of the same size, with its weights."""
    if isinstance(layer, nn.Linear):
        new: nn.Module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    elif isinstance(layer, nn.Conv2d):
        new = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,  # type: ignore[arg-type]
            layer.padding, groups=layer.groups, bias=layer.bias is not None,  # type: ignore[arg-type]
        )  # fmt: skip
    else:
        new = nn.BatchNorm2d(layer.num_features)
    new.load_state_dict(layer.state_dict())
    return new


def _rewritten(dense: nn.Module, small: nn.Module) -> nn.Module:
    """The dense model's class with layers of the pruned sizes written into it."""
    model = copy.deepcopy(dense)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.BatchNorm2d)):
            continue
        pruned = small.get_submodule(name)
        new = nn.Sequential() if isinstance(pruned, nn.Sequential) else _fresh(pruned)
        if isinstance(pruned, nn.Sequential):
            for part in pruned.children():
                take = "index" in part._buffers
                new.append(Take(part.get_buffer("index").clone()) if take else _fresh(part))  # type: ignore[union-attr]
        holder, _, key = name.rpartition(".")
        setattr(model.get_submodule(holder), key, new)
    return model.eval()


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
    models = {"dense original": dense, "by hand": by_hand, "pruned by l0fast": small}
    goals = [Goal("pruned by l0fast", 1.02, "<= 1.02x by hand", "by hand")]
    return _compare(name, device, models, inputs, goals, effort)


def _resnet18(name: str, batch: int, effort: Effort) -> list[Row]:
    torch.manual_seed(0)
    dense = import_module("torchvision.models").resnet18(weights=None).eval()
    example = torch.randn(2, 3, 64, 64)
    gated = l0fast.sparsify_(copy.deepcopy(dense), example_inputs=example)
    _half_closed(gated)
    small = l0fast.prune(gated, example).eval()
    inputs = [(torch.randn(batch, 3, 224, 224),) for _ in range(2)]
    models = {
        "dense original": dense,
        "by hand": _rewritten(dense, small),
        "pruned by l0fast": small,
    }
    goals = [
        Goal("pruned by l0fast", 1.02, "<= 1.02x by hand", "by hand"),
        Goal("pruned by l0fast", 0.5, "<= 0.5x dense", "dense original"),
    ]
    return _compare(name, "cpu", models, inputs, goals, effort)


def _compare(
    name: str,
    device: str,
    models: dict[str, nn.Module],
    inputs: list[tuple[Tensor]],
    goals: list[Goal],
    effort: Effort,
) -> list[Row]:
    """Times one forward of each, side by side; the pruned model and that by hand must agree."""
    small: Any = models["pruned by l0fast"]
    by_hand = models["by hand"]
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

    share = report.params[0] / report.params[1]
    note = f"kept {report.architecture}, {share:.0%} of the parameters"
    return measure(
        name,
        device,
        [
            Variant(title, call(module), note="" if module is models["dense original"] else note)
            for title, module in models.items()
        ],
        effort,
        baseline="by hand",
        goals=goals,
    )


def cases(quick: bool) -> list[Case]:
    """Inference at batch 128 and 1; "hidden" leaves the pixels whole, so nothing is gathered.
    torchvision's ResNet-18 on images of 224x224 has half of all gates closed."""
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
    for batch in (1, 8):
        name = f"prune/cpu/resnet18/batch-{batch}"
        found.append(Case(name, "cpu", functools.partial(_resnet18, name, batch)))
    return found
