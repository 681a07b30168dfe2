"""Short trainings of a small model on the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0fast import Trainer, TrainerSettings
from l0fast.data.sets import Data, Split
from l0fast.training import models

QUICK: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 32,
    "lr": 5e-3,
    "gate_lr": 0.05,
    "dual_lr": 0.1,
    "target_schedule": "constant",
    "weight_decay": 0.0,
}
"""A training of half a second; not this project's recipe."""


def small_mlp() -> nn.Module:
    torch.manual_seed(0)
    return models.build("mlp", (1, 8, 8), 10, (32, 16))


def small_lenet5() -> nn.Module:
    return models.build("lenet5", (1, 8, 8), 10, (6, 8, 20))


def quick(**settings: Any) -> TrainerSettings:
    """QUICK, with changes."""
    chosen: dict[str, Any] = QUICK | settings
    return TrainerSettings(**chosen)


def trainer(digits: Data, out: Path | None = None, **settings: Any) -> Trainer:
    identity = {"dataset": "digits", "model": "mlp"}
    chosen = quick(**settings)
    return Trainer(small_mlp(), digits, chosen, out=out, identity=identity, device="cpu")


def evaluate(model: nn.Module, split: Split) -> float:
    with torch.no_grad():
        wrong = model.eval()(split.inputs).argmax(1) != split.targets
    return 100 * int(wrong.sum()) / len(wrong)
