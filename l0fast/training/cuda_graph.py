"""A whole training step as one CUDA graph: the host launches it without a host sync.

Forward, Lagrangian, backward, optimizer, projection and dual ascent are captured once and replayed.
Each replay has new noise and the current learning rates, since it reads both from the device. The
first few steps of a training run without a graph; then a step is captured, and again whenever
parameters or the optimizer's state have been replaced. Batches of another size run without it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.layers.handle import handle_of
from l0fast.training.ranks import Ranks
from l0fast.training.settings import TrainerSettings

ORDINARY = 3
"""Ordinary steps before a capture: they choose algorithms, make tables and fill the optimizer's
state."""

Step = Callable[[Any], None]


def why_not(model: nn.Module, device: torch.device) -> str | None:
    """The reason why a step of this model cannot be a CUDA graph; None if it can."""
    if device.type != "cuda":
        return f"the model is on the device {device.type!r}"
    handle = handle_of(model)
    skipping = None if handle is None else handle.skipping
    if skipping is not None and not skipping.unread:
        return "skip=True reads the gates of convolutions back to the host"
    for term in () if handle is None else handle.constraints:
        if term.counts_on_host:
            return f"{type(term).__name__} counts its steps on the host"
    return None


def prevented(settings: TrainerSettings, streamed: bool) -> str | None:
    """The reason why no step of a run can be a CUDA graph, whatever the model; None if it may.

    Args:
        settings: of the run.
        streamed: whether each batch has new memory.
    """
    if Ranks.here().size > 1:
        return "several processes average their gradients"
    if streamed:
        return "batches are streamed"
    return "fp16 scales its loss step by step" if settings.precision == "fp16" else None


def check_asked(settings: TrainerSettings, streamed: bool, device: torch.device) -> None:
    """Refuses `cuda_graph=True` on a device without CUDA graphs, and in a run that cannot use
    them."""
    if settings.cuda_graph is not True:
        return
    if device.type != "cuda":
        _checks.refuse("cuda_graph", True, f"'auto' or False on the device {device.type!r}")
    if (reason := prevented(settings, streamed)) is not None:
        _checks.refuse("cuda_graph", True, f"'auto' or False ({reason})")


def set_learning_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float]) -> None:
    """Sets the learning rate of each group; in place if it is a tensor, which a graph reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _stream(device: torch.device) -> Any:
    """A new stream: the ordinary steps before a capture must run on the capturing stream."""
    return torch.cuda.Stream(device)


def _capture(step: Callable[[], None], stream: Any) -> Callable[[], None]:
    """Captures `step` without running it; returns the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def release_(generator: Any, draw: Callable[[], object]) -> None:
    """Lets a generator draw again after a capture that failed, from its earlier state.

    PyTorch 2.11 leaves it in the capture, so that every later draw raises an error. A copy of its
    state does not belong to the capture.

    Args:
        generator: the default generator of the device.
        draw: draws from it.
    """
    state = generator.get_state()
    try:
        draw()
    except RuntimeError:
        generator.graphsafe_set_state(generator.clone_state())
    generator.set_state(state)


def _after_failure(device: torch.device) -> None:
    """Makes the device usable again after a capture that failed."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        release_(torch.cuda.default_generators[index], lambda: torch.rand(1, device=device))


def _on(stream: Any) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class Steps:
    """Takes the steps of a training, as a CUDA graph if possible; call it within `running()`.

    Args:
        step: a function of the positions of its examples (or of any other item for a batch, if
            there is no graph). It must add its sums to the same tensors each time, and leave no
            gradients.
        model: the one that `step` trains.
        optimizer: the one that `step` uses; it is made capturable if a graph is possible.
        size: of the batches to capture.
        asked: "auto", True (a capture that fails is refused) or False.
        prevented: the reason why a graph is not possible; None if it may be.

    Attributes:
        failure: the reason why there is no graph; "" if one is possible so far.
        captures: number of captures.

    Raises:
        ValueError: `asked` is True, and a graph is not possible.
    """

    def __init__(
        self,
        step: Step,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        size: int,
        asked: str | bool = "auto",
        prevented: str | None = None,
    ) -> None:
        self._step, self._optimizer, self._size, self._asked = step, optimizer, size, asked
        self.failure, self.captures = "", 0
        self._stream: Any = None
        self._static_index: Tensor | None = None
        self._drop_graph()
        self._device: torch.device = optimizer.param_groups[0]["params"][0].device
        reason = "cuda_graph=False" if asked is False else prevented or why_not(model, self._device)
        if reason is not None:
            self._give_up(reason)

    @property
    def status(self) -> str:
        """Whether steps are captured, in words."""
        return self.failure or ("captured" if self.captures else "too few whole batches")

    def _give_up(self, reason: str) -> None:
        """Runs all further steps without a graph; raises an error if a graph was asked for."""
        self.failure = reason
        if self._asked is True:
            _checks.refuse("cuda_graph", True, f"'auto' or False ({reason[:200]})")

    def _drop_graph(self) -> None:
        self._replay: Callable[[], None] | None = None
        self._captured_places: list[tuple[int, torch.Size]] = []
        self._ordinary = 0

    def renew(self) -> None:
        """Captures again, since the step computes something else from now on."""
        self._drop_graph()

    def _places(self) -> list[tuple[int, torch.Size]]:
        """Addresses and shapes of all tensors that a graph of the step refers to."""
        tensors: list[Any] = []
        for group in self._optimizer.param_groups:
            tensors += [*group["params"], group["lr"]]
        for state in self._optimizer.state.values():
            tensors += state.values()
        return [(one.data_ptr(), one.shape) for one in tensors if isinstance(one, Tensor)]

    def _make_capturable(self) -> None:
        for group in self._optimizer.param_groups:
            group["capturable"] = True
            if not isinstance(group["lr"], Tensor):
                group["lr"] = torch.tensor(float(group["lr"]), device=self._device)

    @contextmanager
    def running(self) -> Generator[None]:
        """Within it the steps run on a stream of their own; the caller's stream waits for it."""
        if self.failure:
            yield
            return
        if self._replay is not None and self._places() != self._captured_places:
            self._drop_graph()  # the model has shrunk, or another state was loaded
        self._make_capturable()
        if self._stream is None:
            self._stream = _stream(self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with _on(self._stream):
            yield
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def __call__(self, index: Any) -> None:
        if self.failure or len(index) != self._size:
            self._step(index)
            return
        if self._replay is None and self._ordinary < ORDINARY:
            self._ordinary += 1
            self._step(index)
            return
        if self._static_index is None:
            self._static_index = torch.empty_like(index)
        self._static_index.copy_(index)
        if self._replay is None:
            self._try_capture(self._static_index)
        if self._replay is None:
            self._step(index)
        else:
            self._replay()

    def _try_capture(self, index: Tensor) -> None:
        """Captures a step on the examples whose positions `index` holds at each replay."""
        try:
            self._replay = _capture(lambda: self._step(index), self._stream)
        except RuntimeError as error:
            # The step has not run, but recording its backward may have left gradients.
            self._optimizer.zero_grad()
            _after_failure(self._device)
            self._give_up((str(error).strip().splitlines() or ["it could not be captured"])[0])
            return
        self.captures += 1
        self._captured_places = self._places()
