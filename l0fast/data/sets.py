"""The data sets of the command, each whole, as tensors: digits (embedded in scikit-learn), and
those that torchvision knows.

A data set has to fit into memory, and onto the device, as float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast._extras import require
from l0fast.data import formats
from l0fast.data.formats import Split

COLOURS = 3
DIGITS_TEST = 360
FIXED = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashionmnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
"""Data set -> (shape of an example, number of classes), where neither depends on the files."""
DATASETS = (*FIXED, "imagefolder")


class Data(NamedTuple):
    """A data set: to train on, to select by (None where nothing is held out), to report."""

    train: Split
    validation: Split | None
    test: Split
    num_classes: int


def check_data(data: Data) -> None:
    """Refuses splits that no classifier could be trained or tested on.

    Raises:
        ValueError, TypeError: the first thing that is wrong, by its name in `data`.
    """
    for name in ("train", "validation", "test"):
        split: Split | None = getattr(data, name)
        if split is None and name == "validation":
            continue
        if not (isinstance(split, tuple) and all(isinstance(part, Tensor) for part in split)):
            _checks.refuse(f"data.{name}", split, "inputs and targets as tensors", TypeError)
        inputs, targets = split
        shape, dtype = tuple(targets.shape), targets.dtype
        if dtype != torch.int64 or len(shape) != 1 or not 0 < len(targets) == len(inputs):
            expected = f"int64 and one for each of the {len(inputs)} inputs, at least one"
            _checks.refuse(f"data.{name}.targets", f"{dtype} of shape {shape}", expected)
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= data.num_classes:
            expected = f"classes from 0 to {data.num_classes - 1}"
            _checks.refuse(f"data.{name}.targets", f"{low} to {high}", expected)
        if not bool(torch.isfinite(inputs).all()):
            _checks.refuse(f"data.{name}.inputs", "NaN or infinity", "finite numbers")


def in_colour(data: Data) -> Data:
    """The data with three equal channels in place of one, which torchvision's models take."""

    def three(split: Split) -> Split:
        return Split(split.inputs.expand(-1, COLOURS, -1, -1), split.targets)

    validation = None if data.validation is None else three(data.validation)
    return Data(three(data.train), validation, three(data.test), data.num_classes)


def _digits() -> tuple[Split, Split]:
    """The 1,797 8x8 images of scikit-learn; the last 360 (a fifth, other writers) are the test."""
    require("train", "sklearn")
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


def load(
    dataset: str,
    data_root: str | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    image_size: int | None = None,
) -> Data:
    """A data set, normalised, with a validation split taken from its training examples.

    Args:
        dataset: "digits", "mnist", "fashionmnist", "cifar10", "cifar100" or "imagefolder".
        data_root: torchvision's root folder; L0FAST_DATA_ROOT by default; digits needs none.
            For "imagefolder" the one that holds train/ and test/ (or else val/).
        validation_fraction: of the training examples, in [0, 1), held out at random.
        seed: of that choice.
        image_size: for "imagefolder": the shorter side of every image is resized to it, and the
            centre cropped to a square; None takes images that are all of one size as they are.

    Raises:
        ValueError: an unknown data set, data that is not there or does not fit together, or a
            fraction out of range.
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
    if image_size is not None:
        _checks.whole("image_size", image_size)
        if dataset != "imagefolder":
            _checks.refuse("image_size", image_size, f"none: {dataset} has a size of its own")
    if dataset == "imagefolder":
        train, test, num_classes = formats.imagefolder(data_root, image_size)
    else:
        num_classes = FIXED[dataset][1]
        if dataset == "digits":
            train, test = _digits()
        elif dataset in formats.MNIST_STATISTICS:
            train, test = formats.mnist(dataset, data_root)
        else:
            train, test = formats.cifar(dataset, data_root)
    count = len(train.targets)
    held = round(validation_fraction * count)
    if held == count:
        _checks.refuse(
            "validation_fraction", validation_fraction, f"less than all of the {count} examples"
        )
    validation = None
    if held:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        kept = order[held:].sort().values
        validation = Split(train.inputs[order[:held]], train.targets[order[:held]])
        train = Split(train.inputs[kept], train.targets[kept])
    return Data(train, validation, test, num_classes)
