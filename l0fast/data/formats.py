"""The files of torchvision's MNIST, FashionMNIST, CIFAR-10 and CIFAR-100, as tensors.

Reading writes nothing into their folder. torchvision's own classes download the files.
"""

from __future__ import annotations

import gzip
import math
import os
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast._extras import require
from l0fast._files import open_regular

DATA_ROOT_VARIABLE = "L0FAST_DATA_ROOT"
MNIST_KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")
MOST_BYTES = 2**30
"""The largest size that a file of MNIST's format may state; MNIST's own have less than 2**26."""
MNIST_STATISTICS = {"mnist": ((0.1307,), (0.3081,)), "fashionmnist": ((0.2860,), (0.3530,))}
CIFAR_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


class Split(NamedTuple):
    """Examples: inputs [N, ...] float32 (images: [N, channels, height, width]), and targets: [N]
    int64 classes, or [N, K] float32 numbers or labels."""

    inputs: Tensor
    targets: Tensor


TESTED = 0.2
"""The share of the examples that is the test, if the data have no test of their own."""


def held_out(
    examples: int | Sequence[int], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Splits indices by `seed` into (those that are kept, the share that is held out).

    Raises:
        ValueError: nothing would be kept.
    """
    indices = range(examples) if isinstance(examples, int) else examples
    count = len(indices)
    held = round(fraction * count)
    if held == count:
        _checks.refuse("validation_fraction", fraction, f"less than all of the {count} examples")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = order[held:].sort().values.tolist()
    return [indices[i] for i in kept], [indices[i] for i in order[:held].tolist()]


def hold_out_test(examples: int) -> tuple[list[int], list[int]]:
    """(what is trained on, what is the test) of two examples or more: of both one at least."""
    return held_out(examples, max(TESTED, 1 / examples), 0)


def _idx(raw: Path, name: str) -> Tensor:
    """The bytes of a file in MNIST's idx format, unpacked or gzipped; nothing is written.

    The format: 0, 0, 8 (bytes), D, then D sizes of four bytes, big-endian, then the values.
    """
    path = raw / name
    wanted = "a whole idx file of MNIST"
    try:
        packed = not path.is_file()
        path = raw / f"{name}.gz" if packed else path
        with open_regular(path) as plain, gzip.open(plain) if packed else plain as file:
            # Read no more than the size that it states: a small gzip may unpack to any size.
            content = bytearray(file.read(4))
            dims = content[3] if len(content) > 3 else 0
            start = 4 + 4 * dims
            content += file.read(start - 4)
            if content[:3] != b"\0\0\x08" or len(content) < start:
                _checks.refuse("data_root", str(path), wanted)
            sizes = struct.unpack(f">{dims}I", content[4:start])
            total = start + math.prod(sizes)
            if total > MOST_BYTES:
                _checks.refuse("data_root", str(path), f"{wanted} (it says it has {total} bytes)")
            content += file.read(total + 1 - start)
    except (EOFError, OSError, zlib.error) as error:
        _checks.refuse("data_root", str(path), f"{wanted} ({error})")
    if len(content) != total:
        more = "more" if len(content) > total else len(content)
        _checks.refuse("data_root", str(path), f"{wanted} ({total} bytes, not {more})")
    return torch.frombuffer(content, dtype=torch.uint8, offset=start).view(sizes)


def _normalised(images: Tensor, statistics: tuple[tuple[float, ...], ...]) -> Tensor:
    """[N, C, H, W] bytes -> float32: (images / 255 - mean) / std, by channel."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)
    return images.to(torch.float32).div_(255).sub_(mean).div_(std)


def root_of(root: str | None, wanted: str) -> Path:
    """The data folder: `root`, or else that of the environment variable."""
    root = root or os.environ.get(DATA_ROOT_VARIABLE)
    if root is None:
        _checks.refuse("data_root", root, f"{wanted} (--data-root or {DATA_ROOT_VARIABLE})")
    if not Path(root).is_dir():
        _checks.refuse("data_root", root, f"{wanted}; there is no such folder")
    return Path(root)


def _download(kind: str, root: Path, wanted: str) -> None:
    """Lets torchvision's class `kind` download its files into the folder."""
    require("train", "torchvision")
    from torchvision import datasets

    try:
        getattr(datasets, kind)(str(root), download=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        _checks.refuse("data_root", str(root), f"{wanted}; it could not be downloaded: {reason}")


def mnist(dataset: str, data_root: str | None) -> tuple[Split, Split]:
    kind = {"mnist": "MNIST", "fashionmnist": "FashionMNIST"}[dataset]
    wanted = f"a torchvision data folder that holds {kind}"
    root = root_of(data_root, wanted)
    raw = root / kind / "raw"
    names = [f"{part}-{kind}" for part in ("train", "t10k") for kind in MNIST_KINDS]
    if not all((raw / name).is_file() or (raw / f"{name}.gz").is_file() for name in names):
        _download(kind, root, wanted)
    splits: list[Split] = []
    for index in (0, 2):
        images, targets = _idx(raw, names[index]), _idx(raw, names[index + 1])
        if images.shape[1:] != (28, 28) or targets.shape != images.shape[:1]:
            shapes = f"images {tuple(images.shape)} and targets {tuple(targets.shape)}"
            _checks.refuse("data_root", str(root), f"{wanted}, not {shapes}")
        inputs = _normalised(images.unsqueeze(1), MNIST_STATISTICS[dataset])
        splits.append(Split(inputs, targets.to(torch.int64)))
    return splits[0], splits[1]


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; refuses to call anything else."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.numeric", "_frombuffer"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The few functions that make arrays."""
        module_name = module_name.replace("numpy.core.", "numpy._core.")  # before NumPy 2
        if (module_name, global_name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


def _cifar_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] (bytes) and targets [N] of one of CIFAR's files."""
    wanted = "a whole batch of CIFAR"
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()
        images = torch.tensor(batch["data"], dtype=torch.uint8).view(-1, 3, 32, 32)
        key = "labels" if "labels" in batch else "fine_labels"
        targets = torch.tensor(batch[key], dtype=torch.int64)
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split())
        _checks.refuse("data_root", str(path), f"{wanted} ({type(error).__name__}: {reason})")
    if targets.shape != images.shape[:1]:
        shapes = f"images {tuple(images.shape)} and targets {tuple(targets.shape)}"
        _checks.refuse("data_root", str(path), f"{wanted}, not {shapes}")
    return images, targets


def cifar(dataset: str, data_root: str | None) -> tuple[Split, Split]:
    kind = dataset.upper()
    wanted = f"a torchvision data folder that holds {kind}"
    root = root_of(data_root, wanted)
    folder, train, test = {
        "cifar10": (
            "cifar-10-batches-py",
            [f"data_batch_{number}" for number in range(1, 6)],
            ["test_batch"],
        ),
        "cifar100": ("cifar-100-python", ["train"], ["test"]),
    }[dataset]
    if not all((root / folder / name).is_file() for name in (*train, *test)):
        _download(kind, root, wanted)
    splits: list[Split] = []
    for names in (train, test):
        parts = [_cifar_batch(root / folder / name) for name in names]
        images, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        splits.append(Split(_normalised(images, CIFAR_STATISTICS[dataset]), targets))
    return splits[0], splits[1]
