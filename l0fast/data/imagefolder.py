"""A folder of images as streams of batches, by torchvision's ImageFolder.

DataLoader's workers read and decode an image when its batch is needed. The images are never all in
memory.
"""

from __future__ import annotations

import copy
import hashlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, default_collate

from l0fast import _checks
from l0fast._extras import require
from l0fast.data.augment import AUGMENTS, padding
from l0fast.data.formats import held_out, hold_out_test, root_of

RESIZED = "resized-crop-flip"
IMAGE_AUGMENTS = (*AUGMENTS, RESIZED)
STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's channels, which pretrained models expect."""
VALIDATIONS = ("val", "valid", "validation")
"""Possible names of the folder with the validation examples."""
WANTED = (
    "a folder with train/ and val/ (or test/, or both), or of a folder of images for each class"
)


@dataclass(frozen=True)
class Loading:
    """How images are loaded as batches.

    Args:
        batch_size: examples in a batch.
        image_size: height and width to resize and crop to; None keeps the images as they are, which
            must then all have one size.
        augment: random changes of training images: "none", "crop" or "crop-flip" (as for tensors,
            see `l0fast.data.augment`), or "resized-crop-flip", a random part of the image at
            image_size and half of them mirrored.
        workers: number of processes that load; 0 loads in this process.
        pin_memory: whether batches are in pinned memory, which a GPU copies without the CPU.
    """

    batch_size: int = 128
    image_size: int | None = None
    augment: str = "none"
    workers: int = 0
    pin_memory: bool = False


def load(
    data_root: str | None, loading: Loading, validation_fraction: float, seed: int
) -> tuple[Any, Any, Any, int]:
    """(train, validation or None, test, number of classes); the splits are DataLoaders.

    Args:
        data_root: the folder; L0FAST_DATA_ROOT by default. It has train/ and test/, and perhaps
            val/, valid/ or validation/; without test/, that one is the test. Or the folders of the
            classes are directly in it: then a fifth of the images is the test.
        loading: how its images are loaded.
        validation_fraction, seed: as in `l0fast.data.sets.load`; the fraction must be 0 if the
            folder has a validation part.

    Raises:
        ValueError: it is not such a folder, its parts have different classes, or an option is out
            of range.
    """
    require("train", "torchvision")
    _checks.one_of("augment", loading.augment, IMAGE_AUGMENTS)
    if loading.augment == RESIZED and loading.image_size is None:
        _checks.refuse("augment", RESIZED, "an image_size beside it")
    folders = {name: _folder(path) for name, path in _parts(root_of(data_root, WANTED)).items()}
    train = folders["train"]
    for other in folders.values():
        _refuse_other_classes(train, other)
    if "validation" in folders and validation_fraction:
        expected = f"0: {folders['validation'].root} has the validation examples"
        _checks.refuse("validation_fraction", validation_fraction, expected)
    parts: dict[str, Any] = {name: (one, range(len(one))) for name, one in folders.items()}
    if "test" not in parts:
        if len(train) < 2:
            _checks.refuse("data_root", str(train.root), "two images or more, to train and test on")
        kept, tested = hold_out_test(len(train))
        parts |= {"train": (train, kept), "test": (train, tested)}
    kept, validated = held_out(parts["train"][1], validation_fraction, seed)
    parts["train"] = train, kept
    if validated:
        parts["validation"] = train, validated
    size = loading.image_size or _size_of_first(*parts["test"])
    plain, changed = _transform(size, loading, "none"), _transform(size, loading, loading.augment)
    trained = _loader(_with(train, changed, kept), loading, shuffle=True)
    selecting, test = (
        _loader(_with(parts[name][0], plain, parts[name][1]), loading) if name in parts else None
        for name in ("validation", "test")
    )
    return trained, selecting, test, len(train.classes)


def digest(data_root: str | None) -> str:
    """A digest of the names and sizes of a folder's images, part by part."""
    root = root_of(data_root, WANTED)
    found = hashlib.sha256()
    for name, path in _parts(root).items():
        for image, _ in _folder(path).samples:
            entry = f"{name}{image.removeprefix(str(path))}\0{os.path.getsize(image)}\n"
            found.update(entry.encode(errors="surrogateescape"))
    return found.hexdigest()


def has_validation(data_root: str | None) -> bool:
    """Whether a folder has a validation part."""
    return "validation" in _parts(root_of(data_root, WANTED))


def _parts(root: Path) -> dict[str, Path]:
    """Part of the data set -> its folder; only "train" if the classes are in the root itself."""
    if not any((root / name).is_dir() for name in ("train", "val", "test")):
        return {"train": root}
    held = [root / name for name in VALIDATIONS if (root / name).is_dir()]
    if len(held) > 1:
        names = " and ".join(f"{path.name}/" for path in held)
        _checks.refuse("data_root", str(root), f"only one of {names}")
    parts = {"train": root / "train"}
    if (root / "test").is_dir():
        return parts | {"test": root / "test"} | ({"validation": held[0]} if held else {})
    return parts | {"test": held[0] if held else root / VALIDATIONS[0]}


def _folder(path: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path), loader=_image)
    except OSError as error:
        _checks.refuse("data_root", str(path), f"{WANTED} ({' '.join(str(error).split())})")


def _refuse_other_classes(train: Any, other: Any) -> None:
    if train.classes != other.classes:
        odd = min({*train.classes} ^ {*other.classes})
        expected = f"the classes of {train.root} ({odd!r} is in one only)"
        _checks.refuse("data_root", other.root, expected)


def _image(path: str) -> Any:
    """Reads an image from a file, with three channels."""
    from torchvision.datasets.folder import default_loader

    if not Path(path).is_file():  # a FIFO would block
        _checks.refuse("data_root", path, "an image (it is not a regular file)")
    try:
        return default_loader(path)
    except Exception as error:  # a damaged image, or one that is too large
        _checks.refuse("data_root", path, f"an image ({_checks.one_line(error)})")


def _size_of_first(folder: Any, indices: Sequence[int]) -> tuple[int, int]:
    """(height, width) of the first image."""
    width, height = _image(folder.samples[indices[0]][0]).size
    return height, width


def _transform(size: int | tuple[int, int], loading: Loading, augment: str) -> Any:
    """torchvision's transforms that make an image [3, height, width] float32."""
    from torchvision.transforms import v2

    steps: list[Any] = []
    if augment == RESIZED:
        steps.append(v2.RandomResizedCrop(size))
    elif loading.image_size is not None:
        steps += [v2.Resize(size), v2.CenterCrop(size)]
    if augment in ("crop", "crop-flip"):
        height, width = (size, size) if isinstance(size, int) else size
        pads = [padding(width), padding(height)]
        steps.append(v2.RandomCrop((height, width), pads, padding_mode="edge"))
    if augment in ("crop-flip", RESIZED):
        steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS)]
    return v2.Compose(steps)


def _with(folder: Any, transform: Any, indices: Sequence[int]) -> Subset[Any]:
    """Some images of a folder, without listing the folder again."""
    folder = copy.copy(folder)
    folder.transform = transform
    return Subset(folder, indices)


def _loader(images: Subset[Any], loading: Loading, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(
        images,
        loading.batch_size,
        shuffle,
        num_workers=loading.workers,
        pin_memory=loading.pin_memory,
        collate_fn=_collated,
        worker_init_fn=_begin_worker,
    )


def _collated(examples: list[Any]) -> Any:
    """The batch of some examples, which must have one size."""
    sizes = sorted({"x".join(map(str, image.shape[1:])) for image, _ in examples})
    if len(sizes) > 1:
        _checks.refuse(
            "image_size",
            None,
            f"a number, as the images have several sizes: {' and '.join(sizes[:2])}",
        )
    return default_collate(examples)


def _begin_worker(_number: int) -> None:
    """Lets SIGTERM end a worker at once; the main process tells the user."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
