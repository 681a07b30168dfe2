"""The model's own parameters and its gates, apart, for any optimizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l0fast import _checks
from l0fast.layers.handle import gated_layers, own_gates

GATE_TRAVEL = 30.0
GATE_LR_RANGE = (0.03, 0.3)


def default_gate_lr(steps: int) -> float:
    """Adam's learning rate for log_alpha in a training of that many steps.

    Equals: GATE_TRAVEL / steps, within GATE_LR_RANGE. A gate travels about 3 from its start to
    closed, and Adam moves it by at most one learning rate a step: a short training needs larger
    steps.
    """
    least, most = GATE_LR_RANGE
    return min(max(GATE_TRAVEL / steps, least), most)


def param_groups(
    model: nn.Module,
    lr: float,
    gate_lr: float | None = None,
    *,
    steps: int | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: the model's own parameters, and its gates.

    Args:
        model: a model with gates.
        lr: learning rate of the weights, > 0.
        gate_lr: learning rate of every log_alpha, > 0. By default it follows from `steps`.
        steps: optimizer steps of the whole training, >= 1. The gates' learning rate is then
            30 / steps, at least 0.03 and at most 0.3, which is right for Adam. Without `gate_lr`
            and `steps` it is `lr`.
        weight_decay: of the weights, >= 0; the gates have none.

    Returns:
        Two groups, {"params", "lr", "weight_decay"}: weights first, gates second.

    Raises:
        ValueError, TypeError: the model has no gates, or a number is out of range.

    >>> model = l0fast.sparsify_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    >>> weights, gates = l0fast.param_groups(model, lr=1e-3, steps=1000)
    >>> len(weights["params"]), len(gates["params"]), gates["lr"]
    (4, 2, 0.03)
    """
    _checks.module("model", model)
    _checks.number("lr", lr, "a number > 0", low=0.0, open_low=True)
    if gate_lr is not None:
        _checks.number("gate_lr", gate_lr, "a number > 0", low=0.0, open_low=True)
    if steps is not None:
        _checks.whole("steps", steps)
    _checks.number("weight_decay", weight_decay, "a number >= 0", low=0.0)
    layers = gated_layers(model)
    if not layers:
        _checks.refuse("model", type(model).__name__, "a model with gates (see sparsify_)")
    if gate_lr is None:
        gate_lr = lr if steps is None else default_gate_lr(steps)
    gates: list[Tensor] = [layers[name].log_alpha for name in own_gates(layers)]
    ids = {id(gate) for gate in gates}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [
        {"params": weights, "lr": lr, "weight_decay": weight_decay},
        {"params": gates, "lr": gate_lr, "weight_decay": 0.0},
    ]
