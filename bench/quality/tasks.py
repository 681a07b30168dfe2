"""What is trained: a net, its data, and how long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l0fast.data import sets
from l0fast.data.formats import Split
from l0fast.data.sets import Data
from l0fast.training import models

MNIST_PART = 4000
"""Images of MNIST to train on, and as many to validate on."""


def bn_conv(in_shape: tuple[int, ...]) -> nn.Sequential:
    """Three 3x3 convolutions with batch norms, 16-32-64, and a Linear on their means."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((in_shape[0], 16, 1), (16, 32, 2), (32, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp(in_shape: tuple[int, ...]) -> nn.Module:
    """300-100."""
    return models.build("mlp", in_shape, 10, [300, 100])


def small_lenet(in_shape: tuple[int, ...]) -> nn.Module:
    """LeNet with 8-16-64."""
    return models.build("lenet5", in_shape, 10, [8, 16, 64])


@dataclass(frozen=True)
class Task:
    """A net on a data set."""

    build: Callable[[tuple[int, ...]], nn.Module]
    dataset: str
    epochs: tuple[int, int]
    """Of a short training and of a medium one."""
    lr: float
    batch_size: int

    @property
    def settings(self) -> dict[str, Any]:
        """Of every method but the published ones."""
        return {"lr": self.lr, "batch_size": self.batch_size}


TASKS = {
    "MLP, digits": Task(mlp, "digits", (20, 60), 3e-3, 64),
    "LeNet 8-16-64, digits": Task(small_lenet, "digits", (20, 60), 3e-3, 64),
    "BN conv net, digits": Task(bn_conv, "digits", (20, 60), 3e-3, 64),
    "MLP, MNIST": Task(mlp, "mnist", (10, 30), 1e-3, 128),
}
LENGTHS = ("short", "medium")


def load(task: Task, seed: int, data_root: str | None) -> Data:
    """The data of a task. Of digits a quarter is for validation; of MNIST a part is taken."""
    if task.dataset == "digits":
        return sets.load("digits", data_root, 1 / 4, seed)
    whole = sets.load(task.dataset, data_root)
    order = torch.randperm(
        len(whole.train.targets), generator=torch.Generator().manual_seed(seed)
    )

    def part(places: torch.Tensor) -> Split:
        return Split(whole.train.inputs[places], whole.train.targets[places])

    chosen, held = order[:MNIST_PART], order[MNIST_PART : 2 * MNIST_PART]
    return Data(part(chosen), part(held), whole.test, whole.num_classes)
