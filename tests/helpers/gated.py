"""Models with gates, and what a call that refuses must leave as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from l0fast import sparsify_
from l0fast.layers.handle import gated_layers
from tests.helpers.plain_models import Net, mlp


def gated(**options: Any) -> Any:
    """4 gates on outputs of 19 parameters, 36 on inputs of 6, and 18 on single weights."""
    model = sparsify_(Net(), include=["conv", "fc1"], **options)
    return sparsify_(model, gates="weight", **options)


def gated_mlp(*widths: int, mean: float, std: float = 2.0, **options: Any) -> nn.Sequential:
    """An `mlp` whose gates' log_alpha are normal."""
    model = sparsify_(mlp(*widths), **options)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.normal_(mean, std)
    return model


def snapshot(model: nn.Module) -> list[tuple[Any, ...]]:
    """What must not change where sparsify_ refuses: modules, modes, hooks, parameters' values."""
    modules = [
        (name, id(m), m.training, len(m._forward_pre_hooks), len(m._forward_hooks))
        for name, m in model.named_modules()
    ]
    tensors = model.state_dict(keep_vars=True).items()
    return modules + [(name, id(t), t.detach().double().sum().item()) for name, t in tensors]
