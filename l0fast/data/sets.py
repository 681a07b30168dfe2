"""The data sets of the command: digits (part of scikit-learn), some of torchvision's, and the
user's own.

Folders of images are streamed. Every other data set must fit into memory, and onto the device, as
float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast._extras import require
from l0fast.data import arrays, formats, imagefolder
from l0fast.data.formats import Split
from l0fast.data.imagefolder import Loading

COLOURS = 3
CLASSES = "classification"
SPLITS = ("train", "validation", "test")
DIGITS_TEST = 360
FIXED = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashionmnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
"""Data set -> (shape of an example, number of classes), where neither depends on the files."""
IMAGES, ARRAYS = "imagefolder", "arrays"
DATASETS = (*FIXED, IMAGES)
KINDS = (*DATASETS, ARRAYS)
"""The kinds of data sets; for ARRAYS, the path of the file is the name."""


class Data(NamedTuple):
    """A data set: examples to train on, to validate on (or None), and to test on.

    Each part is a `Split` of tensors, or a stream: a DataLoader, or any object that has a length
    and gives its batches each time it is iterated.
    """

    train: Any
    validation: Any
    test: Any
    num_classes: int | None = None
    """Number of outputs of the model: classes, labels or numbers of an example; None if unknown."""
    task: str = CLASSES
    """What the targets are, as in `TrainerSettings`."""


def check_split(name: str, split: Any, task: str | None, num_classes: int | None) -> None:
    """Refuses tensors on which no model can be trained or tested.

    Args:
        name: of the split, for messages.
        split: inputs and targets.
        task: as in `TrainerSettings`; None if the targets may be anything.
        num_classes: as in `Data`.

    Raises:
        ValueError, TypeError: the first problem that is found.
    """
    kinds = [isinstance(part, Tensor) and part.dim() > 0 for part in split]
    if kinds != [True, True]:
        names = [f"{type(part).__name__} {getattr(part, 'shape', '')}".strip() for part in split]
        expected = "inputs and targets as tensors, with a row for each example"
        _checks.refuse(name, f"({', '.join(names)})", expected, TypeError)
    inputs, targets = split
    name, shape, dtype = f"{name}.targets", tuple(targets.shape), targets.dtype
    whole = task == "classification"
    fits = dtype == torch.int64 and len(shape) == 1 if whole else dtype.is_floating_point
    if not (fits or task is None) or not 0 < len(targets) == len(inputs):
        kind = "tensors" if task is None else "int64" if whole else "floating"
        expected = f"{kind} and one for each of the {len(inputs)} inputs, at least one"
        _checks.refuse(name, f"{dtype} of shape {shape}", expected)
    low, high = (0, 0) if task is None else (targets.min().item(), targets.max().item())
    if whole and num_classes is not None and (low < 0 or high >= num_classes):
        _checks.refuse(name, f"{low} to {high}", f"classes from 0 to {num_classes - 1}")
    if task == "multilabel" and (low < 0 or high > 1):
        _checks.refuse(name, f"{low} to {high}", "numbers from 0 to 1, one for each label")
    for what, tensor in (("inputs", inputs), ("targets", targets)):
        if not bool(torch.isfinite(tensor).all()):
            wrong = name.replace("targets", what)
            _checks.refuse(wrong, "NaN or infinity", "finite numbers")


def in_colour(data: Data) -> Data:
    """The data with three equal channels in place of one, as torchvision's models need them.

    Streams of images have three already.
    """

    def three(split: Any) -> Any:
        if not isinstance(split, Split) or split.inputs.dim() != 4:
            return split
        return Split(split.inputs.expand(-1, COLOURS, -1, -1), split.targets)

    return data._replace(**{name: three(getattr(data, name)) for name in SPLITS})


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


def example_of(data: Data) -> Tensor:
    """[1, ...]: the inputs of one example."""
    if isinstance(data.train, Split):
        return data.train.inputs[:1]
    inputs, _ = data.test.dataset[0]  # training images are changed at random
    return inputs[None]


def load(
    dataset: str,
    data_root: str | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    loading: Loading | None = None,
    task: str | None = None,
) -> Data:
    """A data set, with a validation split taken from its training examples.

    Args:
        dataset: one of KINDS.
        data_root: torchvision's root folder; L0FAST_DATA_ROOT by default; digits needs none. For
            "imagefolder" and "arrays" it is the folder or file itself (see their modules).
        validation_fraction: share of the training examples, in [0, 1), to hold out at random.
        seed: of the random choice.
        loading: how the images of an "imagefolder" are loaded.
        task: as in `TrainerSettings`; None takes it from the targets.

    Raises:
        ValueError: the data set is unknown, its files are missing or do not fit together, or the
            fraction is out of range.
    """
    _checks.one_of("dataset", dataset, KINDS)
    _checks.number(
        "validation_fraction",
        validation_fraction,
        "a number in [0, 1)",
        low=0.0,
        high=1.0,
        open_high=True,
    )
    if dataset != ARRAYS and task not in (None, CLASSES):
        _checks.refuse("task", task, f"{CLASSES!r}, as the targets of {dataset} are")
    loading = loading or Loading()
    if loading.image_size is not None:
        _checks.whole("image_size", loading.image_size)
        if dataset != IMAGES:
            _checks.refuse(
                "image_size", loading.image_size, f"none: the images of {dataset} have a fixed size"
            )
    if dataset == IMAGES:
        return Data(*imagefolder.load(data_root, loading, validation_fraction, seed))
    if dataset == ARRAYS:
        train, test, num_classes, task = arrays.load(str(data_root), task)
    else:
        num_classes, task = FIXED[dataset][1], CLASSES
        if dataset == "digits":
            train, test = _digits()
        elif dataset in formats.MNIST_STATISTICS:
            train, test = formats.mnist(dataset, data_root)
        else:
            train, test = formats.cifar(dataset, data_root)
    kept, held = formats.held_out(len(train.targets), validation_fraction, seed)
    validation = None
    if held:
        validation = Split(train.inputs[held], train.targets[held])
        train = Split(train.inputs[kept], train.targets[kept])
    return Data(train, validation, test, num_classes, task)
