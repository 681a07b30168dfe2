"""Image files, as small as they can be."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def idx(values: torch.Tensor) -> bytes:
    """A tensor of bytes in MNIST's format."""
    sizes = struct.pack(f">{values.dim()}I", *values.shape)
    return b"\0\0\x08" + bytes([values.dim()]) + sizes + bytes(values.flatten().tolist())


def tiny_imagefolder(root: Path, held: str = "val", sizes: Any = ((8, 6),)) -> None:
    """Two images of two classes in train/ and in `held`, of the sizes (width, height) in turn."""
    index = 0
    for part in ("train", held):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(2):
                colour = (30 * index, 255, number)
                Image.new("RGB", sizes[index % len(sizes)], colour).save(
                    root / part / name / f"{number}.png"
                )
                index += 1
