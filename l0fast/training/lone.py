"""Batches of which a forward sees one example: batch norms may not be able to train on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from l0fast import _checks
from l0fast.graph.calls import Example, own_randomness
from l0fast.graph.computed import copied
from l0fast.training.batches import Batches, rows_of
from l0fast.training.ranks import Ranks
from l0fast.training.settings import TrainerSettings

REFUSED = "Expected more than 1 value per channel when training"
"""How PyTorch's error begins."""


def refuse_lone_examples(
    model: nn.Module, train: Batches, settings: TrainerSettings, example_inputs: Any
) -> None:
    """Refuses batches of which a forward would see one example that a batch norm cannot train on.
    (A large image is enough: a batch norm sees its pixels.)

    Raises:
        ValueError: there is such a batch in each epoch.
    """
    parts = settings.accumulate * Ranks.here().size
    lone = [size for size in sorted(train.sizes) if _leaves_one(size, settings.accumulate)]
    if not lone or not _refuses_one(model, example_inputs):
        return
    got = f"a batch of {lone[0]} in each epoch" + (f", in {parts} parts" if parts > 1 else "")
    expected = "two examples or more in each forward, as batch norms cannot be trained on one"
    if train.streamed:
        _checks.refuse("data.train", got, f"{expected} (drop_last=True drops a small last batch)")
    _checks.refuse("batch_size", settings.batch_size, f"{expected} (there is {got})")


def _leaves_one(size: int, accumulate: int) -> bool:
    """Whether a forward sees one example of a batch of that size, on any process."""
    rows = max(size // Ranks.here().size, 1)
    return rows // min(accumulate, rows) == 1


def _refuses_one(model: nn.Module, example_inputs: Any) -> bool:
    """Whether the model cannot be trained on a single example because of a batch norm."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return False
    with own_randomness(model), torch.no_grad():
        try:
            example = Example.of(rows_of(example_inputs, slice(1)), model)
            example.call(copied(model).train())
        except Exception as error:  # what else is wrong, the training says
            return str(error).startswith(REFUSED)
    return False
