"""The data sets of the command, whole, as tensors: digits (embedded in scikit-learn) and MNIST."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks

DATASETS = ("digits", "mnist")
DATA_ROOT_VARIABLE = "L0FAST_DATA_ROOT"
DIGITS_TEST = 360
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081


class Split(NamedTuple):
    """Examples: inputs [N, channels, height, width] float32, and targets [N] int64."""

    inputs: Tensor
    targets: Tensor


class Data(NamedTuple):
    """A data set: to train on, to select by (None where nothing is held out), to report."""

    train: Split
    validation: Split | None
    test: Split
    num_classes: int


def _digits() -> tuple[Split, Split]:
    """The 1,797 8x8 images of scikit-learn; the last 360 (a fifth, other writers) are the test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)  # type: ignore[union-attr]
    targets = torch.tensor(bunch.target, dtype=torch.int64)  # type: ignore[union-attr]
    train = inputs[:-DIGITS_TEST]
    inputs = (inputs - train.mean()) / train.std()
    return (
        Split(inputs[:-DIGITS_TEST], targets[:-DIGITS_TEST]),
        Split(inputs[-DIGITS_TEST:], targets[-DIGITS_TEST:]),
    )


def _mnist(root: str | None) -> tuple[Split, Split]:
    root = root or os.environ.get(DATA_ROOT_VARIABLE)
    wanted = "a torchvision data folder that holds MNIST"
    if root is None:
        _checks.refuse("data_root", root, f"{wanted} (--data-root or {DATA_ROOT_VARIABLE})")
    if not Path(root).is_dir():
        _checks.refuse("data_root", root, f"{wanted}; there is no such folder")
    from torchvision.datasets import MNIST

    splits: list[Split] = []
    for train in (True, False):
        try:
            try:
                images = MNIST(root, train=train)
            except RuntimeError:  # not unpacked yet: torchvision unpacks, or downloads
                images = MNIST(root, train=train, download=True)
        except (RuntimeError, OSError, ValueError, EOFError) as error:
            reason = " ".join(str(error).split())
            _checks.refuse("data_root", root, f"{wanted}; it could not be had: {reason}")
        inputs = images.data.to(torch.float32).div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)
        splits.append(Split(inputs.unsqueeze(1), images.targets.to(torch.int64)))
    return splits[0], splits[1]


def load(
    dataset: str, data_root: str | None = None, validation_fraction: float = 0.0, seed: int = 0
) -> Data:
    """A data set, normalised, with a validation split taken from its training examples.

    Args:
        dataset: "digits" or "mnist".
        data_root: torchvision's root folder; L0FAST_DATA_ROOT by default; digits needs none.
        validation_fraction: of the training examples, in [0, 1), held out at random.
        seed: of that choice.

    Raises:
        ValueError: an unknown data set, data that is not there, or a fraction out of range.
    """
    _checks.one_of("dataset", dataset, DATASETS)
    _checks.number(
        "validation_fraction",
        validation_fraction,
        "a number in [0, 1)",
        low=0.0,
        high=1.0,
        open_high=True,
    )
    train, test = _digits() if dataset == "digits" else _mnist(data_root)
    count = len(train.targets)
    held = round(validation_fraction * count)
    validation = None
    if held:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = order[held:].sort().values
        validation = Split(train.inputs[order[:held]], train.targets[order[:held]])
        train = Split(train.inputs[kept], train.targets[kept])
    return Data(train, validation, test, 10)
