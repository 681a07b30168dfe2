"""The interface of batches, and the batches of tensors that are on the device as a whole.

The batches of an epoch depend on (seed, epoch) alone. So a resumed run gets the same batches as a
run that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from l0fast import _checks
from l0fast.data.augment import augmented
from l0fast.data.sets import Split
from l0fast.training.ranks import Ranks
from l0fast.training.settings import TrainerSettings

EVALUATION_BATCH = 1000
STRIDE = 1_000_003
"""Difference between the seeds of epoch 0 of two runs with consecutive seeds."""


def size_of(batch: Any) -> int:
    """The number of examples in a batch: the length of its first tensor."""
    found = (leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim())
    if (first := next(found, None)) is None:
        expected = (
            "a tensor, or a tuple, list or dict of tensors whose first dimension is the examples"
        )
        _checks.refuse("batch", type(batch).__name__, expected, TypeError)
    return len(first)


def rows_of(batch: Any, rows: slice) -> Any:
    """Some examples of a batch: these rows of each tensor that has one row an example."""
    size = size_of(batch)

    def of(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size
        return leaf[rows] if whole else leaf

    return tree_map(of, batch)


def are_images(tensor: Tensor) -> bool:
    """Whether a tensor is [N, channels, height, width]."""
    return tensor.dim() == 4


def placed(tensor: Any, device: torch.device) -> Any:
    """Moves a tensor to the device, images with channels last in memory.

    Any other object is returned as it is. A copy from pinned memory does not block.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    # Convolutions and pooling run about twice as fast on a CPU with channels last.
    layout = torch.channels_last if are_images(tensor) else torch.contiguous_format
    return tensor.to(device, memory_format=layout, non_blocking=True)


def seed_of(seed: int, epoch: int) -> int:
    return seed * STRIDE + epoch


def sizes_of(examples: int, batch_size: int, drop_last: bool = False) -> set[int]:
    """The sizes of the batches that so many examples make."""
    whole, rest = divmod(examples, batch_size)
    return ({batch_size} if whole else set()) | ({rest} if rest and not drop_last else set())


class Batches(Protocol):
    """The batches of one split."""

    examples: int | None
    """Number of examples; None if it is not known."""
    streamed: bool
    """Whether each batch has new memory; a CUDA graph needs the same memory each time."""
    sizes: set[int]
    """The numbers of examples that a batch of an epoch may have, as far as they are known."""

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        ...

    def epoch(self, epoch: int) -> Iterator[Any]:
        """Yields an item for each training batch of an epoch; `batch` makes the batch from it."""
        ...

    def size(self, item: Any) -> int:
        """The number of examples in the batch of an item, of all processes."""
        ...

    def batch(self, item: Any) -> Any:
        """This process's rows of an item's batch, on the device (see `Ranks.rows`)."""
        ...

    def whole(self, epoch: int) -> Iterator[Any]:
        """Yields this process's share of all examples, in batches on the device, for the evaluation
        after that epoch."""
        ...

    def first(self, most: int) -> Any:
        """A batch of at most `most` examples."""
        ...


class InMemory:
    """A split whose tensors are on the device as a whole."""

    streamed = False

    def __init__(self, split: Split, settings: TrainerSettings, device: torch.device) -> None:
        self.split = Split(placed(split.inputs, device), placed(split.targets, device))
        self.examples: int | None = len(split.targets)
        self.sizes = sizes_of(len(split.targets), settings.batch_size)
        self._size, self._seed = settings.batch_size, settings.seed
        self._augment, self._device = settings.augment, device
        self._ranks = Ranks.here()

    def __len__(self) -> int:
        return math.ceil(len(self.split.targets) / self._size)

    def epoch(self, epoch: int) -> Iterator[Tensor]:
        """The positions of the examples of each batch."""
        generator = torch.Generator().manual_seed(seed_of(self._seed, epoch))
        order = torch.randperm(len(self.split.targets), generator=generator).to(self._device)
        return iter(order.split(self._size))

    def size(self, item: Tensor) -> int:
        """The number of positions."""
        return len(item)

    def batch(self, item: Tensor) -> Any:
        """(inputs, targets) at these positions, without a host sync."""
        rows = self._ranks.rows(len(item))
        inputs = augmented(self.split.inputs, item, self._augment, rows)
        return inputs, self.split.targets.index_select(0, item[rows])

    def whole(self, epoch: int) -> Iterator[Any]:
        """Yields (inputs, targets), in the order of the split."""
        mine = self._ranks.share(len(self.split.targets))
        inputs, targets = (part[mine].split(EVALUATION_BATCH) for part in self.split)
        return zip(inputs, targets, strict=True) if mine.start < mine.stop else iter(())

    def first(self, most: int) -> Any:
        """The first (inputs, targets)."""
        return self.split.inputs[:most], self.split.targets[:most]
