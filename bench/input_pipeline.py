"""`python -m bench.input_pipeline`: images a second from a folder of JPEG files, as the trainer
streams them, against torchvision's plain loop.

Both read the same files with the same transforms, batch size and number of workers: the plain loop
is `for images, targets in DataLoader(ImageFolder(...))`, as in torchvision's references. Rounds are
interleaved; the medians and their ratio are written into input_pipeline.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bench import ROOT
from l0fast.data import imagefolder
from l0fast.training.streams import Streamed

OUT = ROOT / "bench" / "results" / "input_pipeline" / "input_pipeline.md"
SIDE, SIZE, BATCH = 256, 224, 64


def write_images(root: Path, count: int) -> None:
    """Crops of the two photographs of scikit-learn, a class each, as JPEG of SIDE pixels."""
    generator = torch.Generator().manual_seed(0)
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for part in ("train", "val"):
            (root / part / name).mkdir(parents=True)
        high, wide = photo.shape[0] - SIDE, photo.shape[1] - SIDE
        for number in range(count // 2):
            row, column = (int(torch.randint(n, (), generator=generator)) for n in (high, wide))
            piece = Image.fromarray(photo[row : row + SIDE, column : column + SIDE])
            piece.save(root / "train" / name / f"{number}.jpg", quality=90)
        Image.fromarray(photo[:SIDE, :SIDE]).save(root / "val" / name / "0.jpg")


def plain(root: Path, workers: int) -> Iterable[Any]:
    """torchvision's own way."""
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*imagefolder.STATISTICS),
        ]
    )
    images = ImageFolder(str(root / "train"), transform)
    return DataLoader(images, BATCH, shuffle=True, num_workers=workers)


def streamed(root: Path, workers: int) -> Streamed:
    """The trainer's way, from the files to batches on the device."""
    loading = imagefolder.Loading(BATCH, SIZE, imagefolder.RESIZED, workers)
    train, *_ = imagefolder.load(str(root), loading, 0.0, 0)
    return Streamed("data.train", train, 0, torch.device("cpu"))


def rate(batches: Iterable[Any]) -> float:
    """Images a second of one pass."""
    started, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.input_pipeline", description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    words = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, words.images)
        loader, ours = plain(root, words.workers), streamed(root, words.workers)
        rates: tuple[list[float], list[float]] = ([], [])
        for number in range(words.rounds + 1):
            both = (rate(loader), rate(ours.whole(number)))
            for found, one in zip(rates, both, strict=True):
                if number:  # the first fills the disk's cache
                    found.append(one)
    medians = [statistics.median(found) for found in rates]
    ratio = statistics.median([b / a for a, b in zip(*rates, strict=True)])
    lines = [
        "# Images a second from a folder",
        "",
        f"`python -m bench.input_pipeline --images {words.images} --workers {words.workers} "
        f"--rounds {words.rounds}`: {words.images} JPEGs of {SIDE}x{SIDE}, RandomResizedCrop to "
        f"{SIZE}, flip, normalise, batches of {BATCH}; {words.workers} workers on "
        f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), load "
        f"{os.getloadavg()[0]:.1f}; torch {torch.__version__}, torchvision "
        f"{torchvision.__version__}. Medians of interleaved rounds.",
        "",
        "| | images a second | over the plain loop |",
        "| --- | --- | --- |",
        f"| torchvision's plain loop | {medians[0]:.0f} | 1 |",
        f"| the trainer's stream | {medians[1]:.0f} | {ratio:.3f} |",
    ]
    words.out.parent.mkdir(parents=True, exist_ok=True)
    words.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
