"""Makes the term of the loss, the optimizer and the learning rates from the settings of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.defaults import default_dual_lr
from l0fast.constraints.dual import DUALS, Dual
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.constraints.penalty import L0Penalty
from l0fast.constraints.schedule import TargetSchedule
from l0fast.constraints.start import start_steps
from l0fast.gating.param_groups import param_groups
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.handle import gated_layers, gates
from l0fast.measures.latency import LatencyTable
from l0fast.pruning.timing import with_table
from l0fast.training.settings import TrainerSettings

DUAL_DAMPING = 0.3
"""The gain of the damping part of a dual, times the lowest target."""

Term = DensityConstraint | L0Penalty


def put_gates_(model: nn.Module, settings: TrainerSettings, example_inputs: Any) -> None:
    """Puts gates into a model that has none, unless the training is dense; only the targets of
    the settings hold for them."""
    if not settings.gated:
        return
    if not gated_layers(model):
        where, skip = settings.gates, settings.skip
        sparsify_(model, gates=where, example_inputs=example_inputs, skip=skip)
    gates(model).forget_constraints()


def make_term(
    model: nn.Module,
    settings: TrainerSettings,
    steps: int,
    examples: int | None,
    example_inputs: Any,
    table: LatencyTable | None = None,
) -> Term | None:
    """The constraint or penalty to add to the loss; None for a dense training.

    Args:
        model: with gates, unless the training is dense.
        settings: of the run.
        steps: of the whole run.
        examples: number of training examples; None if a stream has no number.
        example_inputs: as in `sparsify_`.
        table: the latency table, if latency was measured before.
    """
    if settings.penalty is not None:
        per_example = examples if settings.penalty_per_example else None
        if settings.penalty_per_example and examples is None:
            expected = "False: the number of training examples is not known"
            _checks.refuse("penalty_per_example", True, expected)
        penalty = L0Penalty(model, settings.penalty, per_example)
        penalty.open_(start_steps(settings.start, steps))
        return penalty
    asked = settings.density if settings.layer_density is None else settings.layer_density
    if asked is None:
        return None
    measure = with_table(settings.measure if table is None else table, model, example_inputs)
    if settings.method != "l0":
        return MagnitudePruning(
            model,
            asked,
            steps=steps,
            gradual=settings.method == "magnitude",
            measure=measure,
            example_inputs=example_inputs,
        )
    shape = settings.target_schedule
    warmup = _warmup(settings, steps)
    constraint = DensityConstraint(
        model,
        asked,
        measure=measure,
        example_inputs=example_inputs,
        dual=lambda least: _dual(settings, steps, least),
        schedule=None if shape == "constant" else TargetSchedule(warmup, shape),
    )
    constraint.open_(start_steps(settings.start, steps))
    return constraint


def _warmup(settings: TrainerSettings, steps: int) -> int:
    """Number of steps in which the targets fall: after the start, and before the gates settle."""
    drawn = steps * settings.settles_at // settings.epochs - start_steps(settings.start, steps)
    return max(min(math.ceil(settings.target_warmup * steps), drawn), 1)


def _dual(settings: TrainerSettings, steps: int, least: float) -> Dual:
    """The dual that moves the multipliers, for `steps` steps and the lowest target `least`."""
    lr = settings.dual_lr
    if lr is None:
        lr = default_dual_lr(least, steps if settings.target_schedule == "constant" else None)
    options: dict[str, Any] = {"dual_first": settings.dual_first}
    if settings.dual == "ascent":
        options["restarts"] = settings.restarts
    elif settings.dual == "pi":
        options["proportional"] = DUAL_DAMPING / least
    elif settings.dual == "augmented":
        options["penalty"] = DUAL_DAMPING / least
    return DUALS[settings.dual](lr, **options)


def make_optimizer(
    model: nn.Module, settings: TrainerSettings, steps: int
) -> torch.optim.Optimizer:
    """AdamW, with one learning rate for the weights and, if there are gates, one for the gates."""
    groups: Any = [{"params": list(model.parameters())}]
    if settings.gated:
        groups = param_groups(
            model, settings.lr, settings.gate_lr, steps=steps, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)


def rates_at(
    first: Sequence[float], settings: TrainerSettings, step: int, steps: int
) -> list[float]:
    """The learning rate of each group in step number `step` of `steps`.

    `first` are the rates before warm-up and schedule. The rate of the second group, the gates, does
    not change, as they are decided late.
    """
    rising = round(settings.warmup * steps / settings.epochs)
    if step < rising:
        return [first[0] * (step + 1) / rising, *first[1:]]
    if settings.schedule == "constant":
        return list(first)
    share = (step - rising) / (steps - rising)
    return [first[0] * 0.5 * (1 + math.cos(math.pi * share)), *first[1:]]
