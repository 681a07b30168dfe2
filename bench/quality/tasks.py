"""The trainings: a net, its data, and the number of epochs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.short_runs import build
from l0fast.data import sets
from l0fast.data.formats import Split
from l0fast.data.sets import Data

MNIST_PART = 4000
"""Images of MNIST to train on, and as many to validate on."""


@dataclass(frozen=True)
class Task:
    """A net on a data set."""

    net: str
    """The name that `build` has for it."""
    dataset: str
    epochs: tuple[int, int, int]
    """Of a short training, a medium one and a long one."""
    lr: float
    batch_size: int
    finetuning: float | None = None
    """Learning rate. Training then starts from a dense net, trained for a medium number of epochs
    before; the small net from scratch has the epochs of both. None: from a random start."""

    def build(self, in_shape: tuple[int, ...]) -> nn.Module:
        """The dense net, from torch's seed."""
        return build(self.net, in_shape)

    @property
    def pretraining(self) -> int:
        """Epochs in which the dense net is trained before fine-tuning."""
        return 0 if self.finetuning is None else self.epochs[LENGTHS.index("medium")]

    def settings(self, fresh: bool) -> dict[str, Any]:
        """The settings of every method, except the published ones; `fresh` for random weights."""
        tuned = None if fresh else self.finetuning
        return {"lr": tuned or self.lr, "batch_size": self.batch_size}


FINE_TUNED = ", fine-tuned"
LENGTHS = ("short", "medium", "long")
TASKS = {
    "MLP, digits": Task("mlp", "digits", (20, 60, 180), 3e-3, 64),
    "LeNet 8-16-64, digits": Task("lenet 8-16-64", "digits", (20, 60, 180), 3e-3, 64),
    "BN conv net, digits": Task("bn conv", "digits", (20, 60, 180), 3e-3, 64),
    "ViT, digits": Task("vit", "digits", (20, 60, 180), 3e-3, 64),
    "MLP, MNIST": Task("mlp", "mnist", (10, 30, 90), 1e-3, 128),
    "MLP, digits" + FINE_TUNED: Task("mlp", "digits", (20, 60, 180), 3e-3, 64, 1e-3),
    "BN conv net, digits" + FINE_TUNED: Task("bn conv", "digits", (20, 60, 180), 3e-3, 64, 1e-3),
    "ViT, digits" + FINE_TUNED: Task("vit", "digits", (20, 60, 180), 3e-3, 64, 1e-3),
}


def load(task: Task, seed: int, data_root: str | None) -> Data:
    """The data of a task. Of digits a quarter is for validation; of MNIST a part is taken."""
    if task.dataset == "digits":
        return sets.load("digits", data_root, 1 / 4, seed)
    whole = sets.load(task.dataset, data_root)
    order = torch.randperm(len(whole.train.targets), generator=torch.Generator().manual_seed(seed))

    def part(places: torch.Tensor) -> Split:
        return Split(whole.train.inputs[places], whole.train.targets[places])

    chosen, held = order[:MNIST_PART], order[MNIST_PART : 2 * MNIST_PART]
    return Data(part(chosen), part(held), whole.test, whole.num_classes)
