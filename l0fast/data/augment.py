"""Random crops and mirror images of the examples of a batch, drawn on the device."""

from __future__ import annotations

import torch
from torch import Tensor

AUGMENTS = ("none", "crop", "crop-flip")
PADDING = 8
WHOLE = slice(None)


def padding(size: int) -> int:
    """The most pixels by which an image of this height or width is shifted: an eighth of it."""
    return max(1, size // PADDING)


def augmented(images: Tensor, index: Tensor, augment: str, part: slice = WHOLE) -> Tensor:
    """images[index][part], each example cropped, and perhaps mirrored, at random.

    Equals, for each example: its border is repeated for `padding` pixels, and a crop of the image's
    own size is taken at a random place. With "crop-flip", half of the examples are also mirrored
    left to right.

    Args:
        images: [N, channels, height, width], with channels last in memory (else they are copied).
        index: [B] int64, on the images' device.
        augment: "none", "crop" or "crop-flip".
        part: the part of the batch to return; the random numbers are drawn for the whole batch.

    Returns:
        [B, or the length of the part, channels, height, width], with channels last in memory unless
        augment is "none". The random numbers come from the device's generator.

    Source: the crops and mirror images of He et al., 2016 (CIFAR), who pad with zeros.
    """
    if augment == "none":
        return images.index_select(0, index[part])
    batch, (height, width) = len(index), images.shape[-2:]
    rows = _window(height, batch, images.device)
    cols = _window(width, batch, images.device)
    if augment == "crop-flip":
        flip = torch.randint(2, (batch, 1), device=images.device, dtype=torch.bool)
        cols = torch.where(flip, cols.flip(1), cols)
    # Indexing pixels, each with all channels, takes half the time of indexing by three tensors.
    index, rows, cols = index[part], rows[part], cols[part]
    pixels = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])
    places = (index.view(-1, 1, 1) * height + rows.unsqueeze(2)) * width + cols.unsqueeze(1)
    picked = pixels.index_select(0, places.view(-1))
    return picked.view(len(index), height, width, -1).permute(0, 3, 1, 2)


def _window(size: int, batch: int, device: torch.device) -> Tensor:
    """[batch, size]: which pixels of a row or column are seen after a random shift."""
    most = padding(size)
    shift = torch.randint(-most, most + 1, (batch, 1), device=device)
    return (torch.arange(size, device=device) + shift).clamp_(0, size - 1)
