"""A whole training step as one CUDA graph: the host launches it, and waits for nothing.

Forward, Lagrangian, backward, optimizer, clamp and dual ascent are captured once and replayed, each
replay with new noise, since generators and learning rates are read from the device. A step is
captured after a few ordinary ones, which are steps of the training too, and again where parameters
or the optimizer's state have been replaced. Batches of another size are computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.layers.handle import handle_of

ORDINARY = 3
"""Steps before a capture: they choose algorithms, make tables and fill the optimizer's state."""

Step = Callable[[Tensor], None]


def why_not(model: nn.Module, device: torch.device) -> str | None:
    """Why a step of this model cannot be a CUDA graph, in words; None where it can."""
    if device.type != "cuda":
        return f"the model is on the device {device.type!r}"
    handle = handle_of(model)
    skipping = None if handle is None else handle.skipping
    if skipping is not None and not skipping.unread:
        return "skip=True reads the gates of convolutions back to the host"
    return None


def check_asked(asked: object, device: torch.device) -> None:
    """Refuses a graph that is asked for where there can be none, whatever the model."""
    _checks.auto_or_bool("cuda_graph", asked)
    if asked is True and device.type != "cuda":
        _checks.refuse("cuda_graph", asked, f"'auto' or False on the device {device.type!r}")


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Gives each group its learning rate, in place where a graph reads it."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _stream(device: torch.device) -> Any:
    """A stream of its own: a graph is captured on no other than that of the steps before."""
    return torch.cuda.Stream(device)


def _capture(step: Callable[[], None], stream: Any) -> Callable[[], None]:
    """The replay of a step, which is not run for it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def _on(stream: Any) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Steps:
    """Takes the steps of a training, as a CUDA graph where that can be; call it in `running()`.

    Args:
        step: given the positions of its examples; it must put what it counts into the same tensors
            each time, and leave no gradients.
        model: what it trains.
        optimizer: the step's; where a graph can be, it is made capturable.
        size: of the batches that are captured.
        asked: "auto", True (then a failing capture is refused) or False.

    Attributes:
        failure: why there is no graph, in words; "" as long as nothing speaks against it.
        captures: how many there have been.

    Raises:
        ValueError: `asked` is True, and it cannot be.
    """

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        size: int,
        asked: str | bool = "auto",
    ) -> None:
        self._step, self._optimizer, self._size, self._asked = step, optimizer, size, asked
        self.failure, self.captures = "", 0
        self._stream: Any = None
        self._index: Tensor | None = None
        self._forget()
        self._device: torch.device = optimizer.param_groups[0]["params"][0].device
        self._fail("cuda_graph=False" if asked is False else why_not(model, self._device) or "")

    @property
    def status(self) -> str:
        """Whether steps are captured, in words."""
        return self.failure or ("captured" if self.captures else "too few whole batches")

    def _fail(self, reason: str) -> None:
        self.failure = reason
        if reason and self._asked is True:
            _checks.refuse("cuda_graph", True, f"'auto' or False ({reason[:200]})")

    def _forget(self) -> None:
        self._replay: Callable[[], None] | None = None
        self._seen: list[tuple[int, torch.Size]] = []
        self._ordinary = 0

    def _held(self) -> list[tuple[int, torch.Size]]:
        """Where the tensors lie that a graph holds, and their shapes."""
        held: list[Any] = []
        for group in self._optimizer.param_groups:
            held += [*group["params"], group["lr"]]
        for state in self._optimizer.state.values():
            held += state.values()
        return [(one.data_ptr(), one.shape) for one in held if isinstance(one, Tensor)]

    def _make_capturable(self) -> None:
        for group in self._optimizer.param_groups:
            group["capturable"] = True
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(float(group["lr"]), device=self._device)

    @contextmanager
    def running(self) -> Generator[None]:
        """Some steps in a row: on a stream of their own, which the caller's waits for."""
        if self.failure:
            yield
            return
        if self._replay is not None and self._held() != self._seen:
            self._forget()  # the model has shrunk, or another state was loaded
        self._make_capturable()
        if self._stream is None:
            self._stream = _stream(self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._stream):
            yield
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def __call__(self, index: Tensor) -> None:
        if len(index) != self._size or self.failure:
            self._step(index)
            return
        if self._replay is None and self._ordinary < ORDINARY:
            self._ordinary += 1
            self._step(index)
            return
        if self._index is None:
            self._index = torch.empty_like(index)
        self._index.copy_(index)
        if self._replay is None:
            self._try()
        if self._replay is None:
            self._step(index)
        else:
            self._replay()

    def _try(self) -> None:
        """Captures a step, or says why that failed."""
        static = self._index
        assert static is not None
        try:
            self._replay = _capture(lambda: self._step(static), self._stream)
        except RuntimeError as error:
            # Nothing has run, but what was recorded may have left its gradients.
            self._optimizer.zero_grad()
            self._fail((str(error).strip().splitlines() or ["it could not be captured"])[0])
            return
        self.captures += 1
        self._seen = self._held()
