"""A CUDA graph on a CPU: its capture keeps the operations, and its replay runs them again.

Python does not run again in a replay, as on a GPU: what the host did in the capture is done once,
and a tensor that was replaced since is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from l0fast.training import cuda_graph
from tests.helpers.counting import CaptureSafe

Operation = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_leaves(value) if isinstance(one, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to in place."""
    if not func._schema.is_mutable:
        return
    for at, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[at] if at < len(args) else kwargs.get(argument.name))


class Tape(TorchDispatchMode):
    """Keeps the operations of a step, views aside, and what they write over."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            self._before.setdefault(_storage(tensor), (storage, storage.clone()))
        out = func(*args, **kwargs)
        if not func.is_view:
            self.operations.append((func, args, kwargs, _tensors(out)))
        return out

    def undo(self) -> None:
        """Gives the tensors that were there before the values that they had."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Runs the operations again, on the very same memory."""
        for func, args, kwargs, results in self.operations:
            out = func(*args, **kwargs)
            if func._schema.is_mutable:
                continue
            for result, new in zip(results, _tensors(out), strict=True):
                if _storage(result) != _storage(new):
                    result.detach().copy_(new)


def capture(step: Callable[[], None]) -> Callable[[], None]:
    """Captures a step, without any effect on tensors or noise; returns the replay."""
    state = torch.get_rng_state()
    tape = Tape()
    try:
        with tape, CaptureSafe():
            step()
    finally:
        tape.undo()
        torch.set_rng_state(state)
    return tape.replay


class Stand:
    """Stands in for CUDA where the trainer captures its steps."""

    def __init__(self, patch: pytest.MonkeyPatch, fail: bool = False) -> None:
        self.captured, self.replayed, self.fail = 0, 0, fail
        self._why_not = cuda_graph.why_not
        patch.setattr(cuda_graph, "why_not", self.why_not)
        patch.setattr(cuda_graph, "_stream", lambda device: None)
        patch.setattr(cuda_graph, "_capture", self.capture)

    def why_not(self, model: Any, device: torch.device) -> str | None:
        return self._why_not(model, torch.device("cuda"))

    def capture(self, step: Callable[[], None], stream: Any) -> Callable[[], None]:
        self.captured += 1
        inner = capture(step)
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            self.replayed += 1
            inner()

        return replay
