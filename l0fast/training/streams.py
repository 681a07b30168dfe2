"""Batches from a stream: a DataLoader, or any object that can be iterated again and again.

The random numbers of a stream in an epoch depend on (seed, epoch) alone. So a resumed run gets the
same batches as a run that was not interrupted.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from l0fast import _checks
from l0fast.training.batches import placed, rows_of, seed_of, size_of, sizes_of
from l0fast.training.ranks import Ranks


class Streamed:
    """A split that comes in batches: a DataLoader, or any object with a length that can be iterated
    again and again.

    It has its own random numbers (see `_Randomness`), so the noise of the gates does not depend on
    what it draws. Before each epoch its `generator` and that of its sampler are seeded, and
    `set_epoch` of the stream, its samplers and its data set is called, if they have these.
    """

    streamed = True

    def __init__(self, name: str, stream: Iterable[Any], seed: int, device: torch.device) -> None:
        self._name, self._stream, self._seed, self._device = name, stream, seed, device
        self._ranks = Ranks.here()
        self._mine = of_rank(name, stream, self._ranks)
        self.examples = _length(getattr(stream, "dataset", None))
        self.sizes = _sizes(stream)
        self._first: Any = None

    def __len__(self) -> int:
        return len(self._stream)  # type: ignore[arg-type]

    def epoch(self, epoch: int) -> Generator[tuple[Any, int]]:
        """Yields (this process's rows of a batch, on the host; examples of all processes).

        Raises:
            ValueError: the stream gives more or fewer batches than its length says.
        """
        self._begin(epoch)
        randomness = _Randomness(seed_of(self._seed, epoch))
        with randomness.swapped_in():
            batches = iter(self._mine)
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
            if isinstance(self._mine, DataLoader) and self._mine is not self._stream:
                yield batch, self._mine.batch_sampler.sizes.popleft()  # type: ignore[union-attr]
            else:
                size = size_of(batch)
                yield rows_of(batch, self._ranks.rows(size)), size
        if count != len(self):
            got = "more" if count > len(self) else count
            _checks.refuse(self._name, f"{got} batches", f"{len(self)}, as its length says")

    def _begin(self, epoch: int) -> None:
        """Tells the stream which epoch it is."""
        for part in _parts(self._stream):
            if callable(set_epoch := getattr(part, "set_epoch", None)):
                set_epoch(epoch)
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(seed_of(self._seed, epoch))

    def size(self, item: tuple[Any, int]) -> int:
        """The number of examples, which came with the batch."""
        return item[1]

    def batch(self, item: tuple[Any, int]) -> Any:
        """The rows on the device."""
        return tree_map(lambda leaf: placed(leaf, self._device), item[0])

    def whole(self, epoch: int) -> Iterator[Any]:
        """The batches of an epoch, on the device."""
        return (self.batch(item) for item in self.epoch(epoch) if self._ranks.count(item[1]))

    def first(self, most: int) -> Any:
        """Examples from the first batch of epoch 0."""
        if self._first is None:
            batches = self.epoch(0)
            self._first = self.batch(next(batches))
            batches.close()
        return rows_of(self._first, slice(most))


class _Randomness:
    """The generators of PyTorch (on the CPU), Python and NumPy for one epoch of a stream.

    They are seeded for the epoch, and separate from the generators of the rest of the run.
    """

    def __init__(self, seed: int) -> None:
        self._states: Any = None
        self._seed = seed

    @contextmanager
    def swapped_in(self) -> Generator[None]:
        """Within it the stream's generators are in force; after it, those of the run, unchanged."""
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


class Shares:
    """The batches of a batch sampler, reduced to the indices of this process.

    Attributes:
        sizes: whole sizes of the batches given so far; `Streamed.epoch` takes them out.
    """

    def __init__(self, batches: Iterable[list[int]], ranks: Ranks) -> None:
        self.batches, self.ranks = batches, ranks
        self.sizes: deque[int] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()
        for batch in self.batches:
            self.sizes.append(len(batch))
            yield batch[self.ranks.rows(len(batch))]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def of_rank(name: str, stream: Any, ranks: Ranks) -> Any:
    """The stream for one process: a DataLoader with a batch sampler loads only this process's part
    of each batch; any other stream is returned as it is."""
    if isinstance(getattr(stream, "sampler", None), DistributedSampler):
        expected = "a sampler of all examples: each process gets its share of every batch"
        _checks.refuse(f"{name}.sampler", "DistributedSampler", expected)
    batches = getattr(stream, "batch_sampler", None)
    plain = isinstance(stream, DataLoader) and not isinstance(stream.dataset, IterableDataset)
    if ranks.size == 1 or batches is None or not plain:
        return stream
    options = ("num_workers", "collate_fn", "pin_memory", "timeout", "multiprocessing_context")
    chosen = {option: getattr(stream, option) for option in (*options, "generator")}
    if stream.num_workers:
        chosen["prefetch_factor"] = stream.prefetch_factor
    begin = partial(_begin_worker, ranks.rank, stream.worker_init_fn)
    shares: Any = Shares(batches, ranks)
    return DataLoader(stream.dataset, batch_sampler=shares, worker_init_fn=begin, **chosen)


def _begin_worker(rank: int, then: Callable[[int], None] | None, number: int) -> None:
    """Seeds a worker so that the workers of each process draw different numbers."""
    seed = seed_of(torch.initial_seed(), rank) % 2**63
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if then is not None:
        then(number)


def _of_worker(error: ValueError) -> ValueError:
    """The error as the worker raised it: a DataLoader puts the whole traceback into its message."""
    lines = str(error).strip().splitlines()
    if len(lines) < 2 or not lines[0].startswith("Caught "):
        return error
    return ValueError(lines[-1].partition(": ")[2] or lines[-1])


def _sizes(stream: Any) -> set[int]:
    """The sizes of its batches, if it is a DataLoader that makes them itself."""
    drawn = _length(getattr(stream, "sampler", None))
    if not isinstance(stream, DataLoader) or stream.batch_size is None or drawn is None:
        return set()
    return sizes_of(drawn, stream.batch_size, stream.drop_last)


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
    """Refuses an object that is not a stream, or a stream that a resumed run could not repeat.

    Raises:
        TypeError, ValueError: the message says what is wrong and begins with `name`.
    """
    if not isinstance(stream, Iterable) or isinstance(stream, (str, bytes, Iterator)):
        expected = "a Split, or batches that can be iterated again and again, such as a DataLoader"
        _checks.refuse(name, type(stream).__name__, expected, TypeError)
    if not _length(stream):
        _checks.refuse(name, type(stream).__name__, "a length: its number of batches, at least 1")
    if getattr(stream, "persistent_workers", False):
        expected = (
            "False: workers that live on after an epoch keep their random state, which a resumed "
        )
        _checks.refuse(f"{name}.persistent_workers", True, f"{expected}run does not have")
