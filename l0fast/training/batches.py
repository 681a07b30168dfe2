"""Where the batches of a run come from: tensors on the device, or a stream such as a DataLoader.

An epoch depends on (seed, epoch) alone, so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from l0fast import _checks
from l0fast.data.augment import augmented
from l0fast.data.sets import SPLITS, Data, Split
from l0fast.training.settings import TrainerSettings

EVALUATION_BATCH = 1000
STRIDE = 1_000_003
"""Between the seeds of the epochs of two runs."""


def size_of(batch: Any) -> int:
    """The number of examples in a batch: the length of its first tensor."""
    return len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()))


def are_images(tensor: Tensor) -> bool:
    """Whether a tensor is [N, channels, height, width]."""
    return tensor.dim() == 4


def placed(tensor: Any, device: torch.device) -> Any:
    """A tensor on the device, images with channels last in memory; what is no tensor as it is.

    A copy from pinned memory does not wait.
    """
    if not isinstance(tensor, Tensor):
        return tensor
    # Convolutions and pooling run about twice as fast on a CPU with channels last.
    layout = torch.channels_last if are_images(tensor) else torch.contiguous_format
    return tensor.to(device, memory_format=layout, non_blocking=True)


def _seed_of(seed: int, epoch: int) -> int:
    return seed * STRIDE + epoch


class Batches(Protocol):
    """The batches of one split."""

    examples: int | None
    """How many there are; None where that is not known."""
    images: bool
    """Whether the first tensor of a batch is [N, channels, height, width]."""
    streamed: bool
    """Whether each batch lies at another place in memory."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, epoch: int) -> Iterator[Any]:
        """What stands for each batch of an epoch in training; `batch` makes it one."""
        ...

    def batch(self, item: Any) -> Any:
        """The batch itself, on the device."""
        ...

    def whole(self, epoch: int) -> Iterator[Any]:
        """All examples, in batches on the device, for evaluation after that epoch."""
        ...

    def first(self, most: int) -> Any:
        """A batch of at most so many examples."""
        ...


class InMemory:
    """A split whose tensors lie on the device as a whole."""

    streamed = False

    def __init__(self, split: Split, settings: TrainerSettings, device: torch.device) -> None:
        self.split = Split(placed(split.inputs, device), placed(split.targets, device))
        self.examples: int | None = len(split.targets)
        self.images = are_images(split.inputs)
        self._size, self._seed = settings.batch_size, settings.seed
        self._augment, self._device = settings.augment, device

    def __len__(self) -> int:
        return math.ceil(len(self.split.targets) / self._size)

    def epoch(self, epoch: int) -> Iterator[Tensor]:
        """The positions of the examples of each batch."""
        generator = torch.Generator().manual_seed(_seed_of(self._seed, epoch))
        order = torch.randperm(len(self.split.targets), generator=generator).to(self._device)
        return iter(order.split(self._size))

    def batch(self, item: Tensor) -> Any:
        """(inputs, targets) at those positions; nothing is read back."""
        inputs = augmented(self.split.inputs, item, self._augment)
        return inputs, self.split.targets.index_select(0, item)

    def whole(self, epoch: int) -> Iterator[Any]:
        """(inputs, targets), in their order."""
        inputs, targets = (part.split(EVALUATION_BATCH) for part in self.split)
        return zip(inputs, targets, strict=True)

    def first(self, most: int) -> Any:
        """(inputs, targets)."""
        return self.split.inputs[:most], self.split.targets[:most]


class Streamed:
    """A split that comes in batches: a DataLoader, or anything else with a length that can be
    iterated again and again.

    Its random numbers are its own (see `_Randomness`): the noise of the gates depends on nothing
    that it draws. Before each epoch its `generator` and its sampler's are seeded, and `set_epoch`
    of itself, its samplers and its data set is called, where there are such.
    """

    streamed = True

    def __init__(self, name: str, stream: Iterable[Any], seed: int, device: torch.device) -> None:
        self._name, self._stream, self._seed, self._device = name, stream, seed, device
        self.examples = _length(getattr(stream, "dataset", None))
        self._first: Any = None
        leaf = next((x for x in tree_leaves(self.first(1)) if isinstance(x, Tensor)), None)
        self.images = leaf is not None and are_images(leaf)

    def __len__(self) -> int:
        return len(self._stream)  # type: ignore[arg-type]

    def epoch(self, epoch: int) -> Iterator[Any]:
        """The batches as they come, on the host.

        Raises:
            ValueError: there are more or fewer of them than the stream's length says.
        """
        self._begin(epoch)
        randomness = _Randomness(_seed_of(self._seed, epoch))
        with randomness.swapped_in():
            batches = iter(self._stream)
        count = 0
        while True:
            with randomness.swapped_in():
                try:
                    batch = next(batches, self)
                except ValueError as error:
                    raise _of_worker(error) from error
            if batch is self:
                break
            count += 1
            if count > len(self):
                break
            yield batch
        if count != len(self):
            got = "more" if count > len(self) else count
            _checks.refuse(self._name, f"{got} batches", f"{len(self)}, as its length says")

    def _begin(self, epoch: int) -> None:
        """Tells the stream which epoch it is."""
        for part in _parts(self._stream):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(_seed_of(self._seed, epoch))

    def batch(self, item: Any) -> Any:
        """The batch on the device."""
        return tree_map(lambda leaf: placed(leaf, self._device), item)

    def whole(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch, on the device."""
        return map(self.batch, self.epoch(epoch))

    def first(self, most: int) -> Any:
        """From the first batch of epoch 0."""
        if self._first is None:
            batches = self.epoch(0)
            self._first = self.batch(next(batches))
            batches.close()  # type: ignore[attr-defined]
        return tree_map(lambda x: x[:most] if isinstance(x, Tensor) and x.dim() else x, self._first)


class _Randomness:
    """The generators of PyTorch (on the CPU), Python and NumPy as one epoch of a stream sees them:
    seeded anew, and apart from those of the rest of the run."""

    def __init__(self, seed: int) -> None:
        self._states: Any = None
        self._seed = seed

    @contextmanager
    def swapped_in(self) -> Generator[None]:
        """Within it, the stream's; after it, those of the run as they were."""
        of_the_run = self._get()
        if self._states is None:
            torch.default_generator.manual_seed(self._seed)
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
        else:
            self._set(self._states)
        try:
            yield
        finally:
            self._states = self._get()
            self._set(of_the_run)

    @staticmethod
    def _get() -> Any:
        return torch.get_rng_state(), random.getstate(), np.random.get_state()

    @staticmethod
    def _set(states: Any) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _of_worker(error: ValueError) -> ValueError:
    """An error as the process that loads has raised it: a DataLoader hands on its whole traceback
    as the message."""
    lines = str(error).strip().splitlines()
    if len(lines) < 2 or not lines[0].startswith("Caught "):
        return error
    return ValueError(lines[-1].partition(": ")[2])


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def _parts(stream: Any) -> list[Any]:
    """A stream, its samplers and its data set, each once."""
    batch_sampler = getattr(stream, "batch_sampler", None)
    found = [stream, getattr(stream, "sampler", None), batch_sampler]
    found += [getattr(batch_sampler, "sampler", None), getattr(stream, "dataset", None)]
    return list({id(part): part for part in found if part is not None}.values())


def check_stream(name: str, stream: Any) -> None:
    """Refuses what is no stream, or one that a resumed run could not see again.

    Raises:
        TypeError, ValueError: with what is wrong, under that name.
    """
    if not isinstance(stream, Iterable) or isinstance(stream, (str, bytes, Iterator)):
        expected = "a Split, or batches that can be iterated again and again, as a DataLoader"
        _checks.refuse(name, type(stream).__name__, expected, TypeError)
    if not _length(stream):
        _checks.refuse(name, type(stream).__name__, "a length: its number of batches, at least 1")
    if getattr(stream, "persistent_workers", False):
        expected = (
            "False: workers that outlive an epoch go on with random numbers of before, which "
        )
        _checks.refuse(f"{name}.persistent_workers", True, f"{expected}a resumed run does not have")


def make_batches(name: str, split: Any, settings: TrainerSettings, device: torch.device) -> Batches:
    """The batches of a split on that device; `name` is for messages."""
    if isinstance(split, tuple):
        return InMemory(Split(*split), settings, device)
    return Streamed(name, split, settings.seed, device)


def place(data: Data, settings: TrainerSettings, device: torch.device) -> Any:
    """(train, validation or None, test): the batches of all splits."""
    splits = {name: getattr(data, name) for name in SPLITS}
    return [
        None if split is None else make_batches(f"data.{name}", split, settings, device)
        for name, split in splits.items()
    ]
