"""The processes that train together: who gets which examples, and how they keep in step.

With one process, the usual case, nothing here communicates.
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
    """This process, among those of the default process group.

    Args:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As torch.distributed is set up."""
        if not several_processes():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, examples: int) -> slice:
        """This process's examples of a batch; an empty slice if there are too few examples."""
        return slice(examples * self.rank // self.size, examples * (self.rank + 1) // self.size)

    def count(self, examples: int) -> int:
        """The number of this process's examples."""
        mine = self.share(examples)
        return mine.stop - mine.start

    def rows(self, examples: int) -> slice:
        """As `share`, but never empty: every process needs a forward in each step. The caller does
        not count the example that stands in for an empty share."""
        return self.share(examples) if self.count(examples) else slice(0, 1)

    def summed(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Sums numbers over all processes; the result is the same on each."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(found)
        return found.tolist()

    def of_first(self, work: Callable[[], T]) -> T:
        """Runs `work` on the first process only; returns or raises its result on all."""
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
        """Runs `work` on the first process, then on the others: they find what it downloaded."""
        if self.size == 1:
            return work()
        if not self.first:
            dist.barrier()
        value = work()
        if self.first:
            dist.barrier()
        return value

    def same_noise_(self, device: torch.device) -> None:
        """Sets all processes' generators to the first one's, so that all draw the same gates."""
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
        """As `same_noise_`, and also for Python and NumPy, which the user's loss may draw from."""
        self.same_noise_(device)
        if self.size > 1:
            set_host_rng(self.of_first(host_rng))

    @torch.no_grad()
    def same_tensors_(self, tensors: Sequence[Tensor]) -> None:
        """Sets tensors of all processes to those of the first one."""
        if self.size > 1:
            for tensor in tensors:
                there = tensor.detach().contiguous()
                dist.broadcast(there, 0)
                tensor.detach().copy_(there)

    def parallel(self, model: Any, device: torch.device) -> Any:
        """The model that a step calls, so that gradients are averaged over the processes."""
        if self.size == 1:
            return model
        module: nn.Module = model
        return DistributedDataParallel(module, [device] if device.type == "cuda" else None)
