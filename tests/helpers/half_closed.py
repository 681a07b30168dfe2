"""A model with half of its gates closed, and what must hold of it when it is pruned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l0fast import sparsify_
from l0fast.layers.handle import gated_layers, sharing
from l0fast.layers.serving import alike


def half_closed(model: nn.Module, x: Any, **options: Any) -> Any:
    """With gates, half of each layer's closed, the others partly open."""
    args = x if isinstance(x, tuple) else (x,)
    model = sparsify_(model.double().eval(), example_inputs=args, **options)
    with torch.no_grad():
        for layers in sharing(gated_layers(model)).values():
            log_alpha = next(iter(layers.values())).log_alpha
            log_alpha.uniform_(-1.2, 1.4)
            for part in alike(layers.values()):
                log_alpha.view(-1)[part[: len(part) // 2]] = -4.0
    return model


def assert_same(small: nn.Module, model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        got, expected = small(*inputs), model(*inputs)
    assert expected.abs().max() > 0
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()


def assert_merged(small: Any) -> None:
    """Without a gather or scatter, and without anything undone."""
    report = small.report
    assert report.tier == "merged"
    assert report.notes == []
    assert {site["status"] for site in report.sites} == {"removed"}
