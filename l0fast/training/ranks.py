"""The processes that train together: which examples of a batch are whose, and what they agree on.

One process is the usual case, for which nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from l0fast.layers.draw import several_processes
from l0fast.training.generators import host_rng, set_host_rng

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the default process group.

    Args:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As torch.distributed has been set up."""
        if not several_processes():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, examples: int) -> slice:
        """Which of the examples of a batch are this process's; none, if there are too few."""
        return slice(examples * self.rank // self.size, examples * (self.rank + 1) // self.size)

    def count(self, examples: int) -> int:
        """How many those are."""
        mine = self.share(examples)
        return mine.stop - mine.start

    def rows(self, examples: int) -> slice:
        """Those of `share`, or in its place one that does not count: a step has a forward on every
        process."""
        return self.share(examples) if self.count(examples) else slice(0, 1)

    def summed(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """The sums over all processes, the same on each."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(found)
        return found.tolist()

    def of_first(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises on the first process, which alone runs it, on all."""
        if self.size == 1:
            return work()
        told: list[Any] = [None]
        if self.first:
            try:
                told = [(work(), None)]
            except Exception as error:
                told = [(None, error)]
        dist.broadcast_object_list(told)
        value, error = told[0]
        if error is not None:
            raise error
        return value

    def in_turn(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once the first process has done it: what one has downloaded,
        the others find."""
        if self.size == 1:
            return work()
        if not self.first:
            dist.barrier()
        value = work()
        if self.first:
            dist.barrier()
        return value

    def same_noise_(self, device: torch.device) -> None:
        """Sets the generators to those of the first process, on all: gates are drawn alike."""
        if self.size == 1:
            return
        states = [torch.get_rng_state()]
        if device.type == "cuda":
            states.append(torch.cuda.get_rng_state(device))
        for state in states:
            there = state.to(device)
            dist.broadcast(there, 0)
            state.copy_(there)
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)

    def same_generators_(self, device: torch.device) -> None:
        """The same, and those of Python and NumPy, which a loss of the user's may draw from."""
        self.same_noise_(device)
        if self.size > 1:
            set_host_rng(self.of_first(host_rng))

    @torch.no_grad()
    def same_tensors_(self, tensors: Sequence[Tensor]) -> None:
        """Sets tensors to those of the first process, on all."""
        if self.size > 1:
            for tensor in tensors:
                there = tensor.detach().contiguous()
                dist.broadcast(there, 0)
                tensor.detach().copy_(there)

    def parallel(self, model: Any, device: torch.device) -> Any:
        """What a step calls, so that gradients are averaged over the processes."""
        if self.size == 1:
            return model
        module: nn.Module = model
        return DistributedDataParallel(module, [device] if device.type == "cuda" else None)
