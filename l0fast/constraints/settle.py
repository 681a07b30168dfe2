"""Settling: gates are decided before the end of training, and what trains on is what is pruned.

While gates are drawn, those still undecided count in the expected density by their probability,
and the pruned model has only those that are open in evaluation: it ends below its target, and is
not the model that was trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from l0fast import _checks, _warnings
from l0fast.layers.handle import ModelGates, gate_owners, own_gates
from l0fast.layers.stages import SETTLED
from l0fast.maths.advance import Limits
from l0fast.maths.hard_concrete import HardConcrete
from l0fast.pruning.choose import Budget, choose

LEAST = 0.01
"""A gate that is kept is never less: closed, it would have no gradient to come back by."""


LAG = 0.1
LAG_OF_TARGET = 0.5
"""A density that is further above its target when the gates are decided, or by this share of the
target, is worth a warning."""


def lag_in_words(
    densities: Mapping[str, float],
    targets: Mapping[str, float],
    steps: int | None,
    attached: bool,
) -> str | None:
    """A warning if settling closes much at once, else None; `steps` of the constraint."""
    if attached:
        advice = "The gates had too few steps to follow: train for longer, or with a larger gate_lr"
    elif steps is None:
        advice = "Give the constraint the `steps` of the training, or a larger dual learning rate"
    else:
        advice = (
            "The gates have not followed: give Adam l0fast.param_groups(model, lr, steps=...), or "
            "attach the constraint"
        )
    for name, density in densities.items():
        if density > targets[name] + min(LAG, LAG_OF_TARGET * targets[name]):
            return (
                f"settle: the expected density of {name!r} is {density:.3g}, far above its "
                f"target {targets[name]:.3g}, so units that are in use are closed now. {advice}"
            )
    return None


def warn_of(lag: str | None) -> None:
    """Warns the caller of a `settle`."""
    if lag is not None:
        _warnings.warn(lag)


def _closed(of: HardConcrete) -> float:
    """log_alpha of a gate that goes: its lower bound, at which it is 0."""
    return min(-of.bound, -of.shift - 1.0)


@torch.no_grad()
def settle_(
    handle: ModelGates,
    budgets: list[Budget],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Decides all gates, in place, and takes the noise away.

    Kept are as many as the budgets allow, in the order of open probability (see `choose`), those
    that are closed in evaluation too; in layers without a budget, those that are open. What is kept
    gets the log_alpha whose evaluation gate is its mean under noise, LEAST at least:
        log_alpha = location(max(mean(log_alpha), LEAST))
    and what goes its lower bound. Layers that are settled stay as they are.

    Args:
        handle: of the model.
        budgets: all its targets.
        optimizer: loses what it remembers of every log_alpha.

    Raises:
        ValueError, TypeError: the budgets do not hold one unit of each layer, a log_alpha is NaN,
            or `optimizer` is none; nothing is changed then.
    """
    if not (optimizer is None or isinstance(optimizer, torch.optim.Optimizer)):
        expected = "a torch.optim.Optimizer or None"
        _checks.refuse("optimizer", type(optimizer).__name__, expected, TypeError)
    if handle.settled:
        return
    layers = handle.layers
    kept = choose(layers, budgets, fill=True, uniform=handle.uniform)
    limited = {name for one in budgets for name in one.layers}
    owners = gate_owners(layers)
    for name in own_gates(layers):
        log_alpha, of = layers[name].log_alpha, layers[name].drawn_from
        z = of.mean(log_alpha.double()).clamp_(LEAST, 1.0)
        stays = kept[name].to(log_alpha.device)
        if limited.isdisjoint(n for n, owner in owners.items() if owner == name):
            stays &= layers[name].evaluation_gates() > 0  # `choose` keeps one, if closed
        # Past autograd: a loss that is formed already can still go backward.
        log_alpha.data.copy_(of.location(z).where(stays, _closed(of)))
        if optimizer is not None:
            optimizer.state.pop(log_alpha, None)
    handle.forget_counts()
    handle.set_stage(SETTLED)


def kept_open(of: HardConcrete) -> Limits:
    """The limits of a settled layer's gates: after a step, what was kept stays open.

    What was kept lies between location(LEAST) and the bound, and what goes at its lower bound. A
    step does not take a gate half of the way between the two.
    """
    lower = _closed(of)
    s = (LEAST - of.gamma) / (of.zeta - of.gamma)
    floor = of.temperature * math.log(s / (1 - s))
    return Limits(lower, (lower + floor) / 2, floor, max(of.bound, floor))
