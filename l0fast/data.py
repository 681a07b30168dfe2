"""The data sets of the command, whole, as tensors: digits (embedded in scikit-learn) and MNIST."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from l0fast import _checks

DATASETS = ("digits", "mnist")
DATA_ROOT_VARIABLE = "L0FAST_DATA_ROOT"
DIGITS_TEST = 360
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081
MNIST_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


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


def _idx(raw: Path, name: str) -> Tensor:
    """The bytes of a file in MNIST's idx format, unpacked or gzipped; nothing is written.

    The format: 0, 0, 8 (bytes), D, then D sizes of four bytes, big-endian, then the values.
    """
    path = raw / name
    wanted = "a whole idx file of MNIST"
    try:
        if path.is_file():
            content = path.read_bytes()
        else:
            path = raw / f"{name}.gz"
            content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        _checks.refuse("data_root", str(path), f"{wanted} ({error})")
    dims = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dims
    if content[:3] != b"\0\0\x08" or len(content) < start:
        _checks.refuse("data_root", str(path), wanted)
    sizes = struct.unpack(f">{dims}I", content[4:start])
    if len(content) != start + math.prod(sizes):
        whole = f"{start + math.prod(sizes)} bytes, not {len(content)}"
        _checks.refuse("data_root", str(path), f"{wanted} ({whole})")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).view(sizes)


def _mnist(root: str | None) -> tuple[Split, Split]:
    root = root or os.environ.get(DATA_ROOT_VARIABLE)
    wanted = "a torchvision data folder that holds MNIST"
    if root is None:
        _checks.refuse("data_root", root, f"{wanted} (--data-root or {DATA_ROOT_VARIABLE})")
    if not Path(root).is_dir():
        _checks.refuse("data_root", root, f"{wanted}; there is no such folder")
    raw = Path(root) / "MNIST" / "raw"
    names = [f"{part}-{kind}" for part in ("train", "t10k") for kind in MNIST_KINDS]
    if not all((raw / name).is_file() or (raw / f"{name}.gz").is_file() for name in names):
        from torchvision.datasets import MNIST

        try:
            MNIST(root, download=True)
        except Exception as error:
            reason = " ".join(str(error).split())
            _checks.refuse("data_root", root, f"{wanted}; it could not be downloaded: {reason}")
    splits: list[Split] = []
    for index in (0, 2):
        images, targets = _idx(raw, names[index]), _idx(raw, names[index + 1])
        if images.shape[1:] != (28, 28) or targets.shape != images.shape[:1]:
            shapes = f"images {tuple(images.shape)} and targets {tuple(targets.shape)}"
            _checks.refuse("data_root", root, f"{wanted}, not {shapes}")
        inputs = images.to(torch.float32).div_(255).sub_(MNIST_MEAN).div_(MNIST_STD)
        splits.append(Split(inputs.unsqueeze(1), targets.to(torch.int64)))
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
    return Data(train, validation, test, 10)
