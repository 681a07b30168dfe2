"""What a run trains under, by its settings: the constraint or penalty, and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from l0fast.constraint import DensityConstraint, L0Penalty
from l0fast.dual import DualAscent
from l0fast.settings import TrainerSettings, default_dual_lr, default_gate_lr
from l0fast.sparsify import param_groups

Term = DensityConstraint | L0Penalty


def make_term(
    model: nn.Module, settings: TrainerSettings, steps: int, examples: int, example_inputs: Any
) -> Term | None:
    """The term to add to the loss, or None for a dense training.

    Args:
        model: with gates, unless the training is dense.
        settings: of the run.
        steps: of the whole run.
        examples: how many there are to train on.
        example_inputs: what the model's forward takes.
    """
    if settings.penalty is not None:
        per_example = examples if settings.penalty_per_example else None
        return L0Penalty(model, settings.penalty, per_example)
    target = settings.density if settings.layer_density is None else settings.layer_density
    if target is None:
        return None
    lr = settings.dual_lr
    if lr is None:
        least = min(target.values()) if isinstance(target, Mapping) else target
        lr = default_dual_lr(steps, least)
    return DensityConstraint(
        model,
        target,
        measure=settings.measure,
        example_inputs=example_inputs,
        dual=DualAscent(lr, settings.restarts),
    )


def make_optimizer(
    model: nn.Module, settings: TrainerSettings, steps: int
) -> torch.optim.Optimizer:
    """Adam on the weights, and on the gates where there are some, each at its learning rate."""
    groups: Any = [{"params": list(model.parameters())}]
    if settings.gated:
        gate_lr = settings.gate_lr or default_gate_lr(steps)
        groups = param_groups(model, settings.lr, gate_lr, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
