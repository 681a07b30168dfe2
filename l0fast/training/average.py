"""The moving average of a model's weights, which is evaluated and pruned in their place."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from l0fast.layers.handle import gated_layers


class Average:
    """The exponential moving average of weights and of floating buffers (those of batch norms).

    Equals, after each step, from the values after the first one:
        average = decay * average + (1 - decay) * value

    The gates are not averaged: which units stay, and by how much they count, is decided on the
    model itself, where the constraint holds.

    Args:
        model: it is changed only within `in_force`.
        decay: in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model = model
        self._update = get_ema_multi_avg_fn(decay)
        self._values: dict[str, Tensor] = {}

    def _current(self) -> dict[str, Tensor]:
        """Name -> each tensor that is averaged."""
        gates = {id(layer.log_alpha) for layer in gated_layers(self._model).values()}
        named = [*self._model.named_parameters(), *self._model.named_buffers()]
        return {n: x.detach() for n, x in named if x.is_floating_point() and id(x) not in gates}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the values after a step in."""
        current = self._current()
        if not self._values:
            self._values = {name: value.clone() for name, value in current.items()}
            return
        self._update(list(self._values.values()), list(current.values()), 0)
        for name, _ in self._model.named_buffers():
            if name in current:  # a mask of -inf has no average
                value, average = current[name], self._values[name]
                average.copy_(average.where(value.isfinite(), value))

    @contextmanager
    def in_force(self) -> Generator[None]:
        """Within it the model has the average; its own values come back after it, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """In place: a CUDA graph refers to the model's tensors."""
        for name, value in self._current().items() if self._values else ():
            kept = value.clone()
            value.copy_(self._values[name])
            self._values[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> average; empty before the first step."""
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state."""
        current = self._current()
        self._values = {name: value.to(current[name], copy=True) for name, value in state.items()}

    def names(self) -> list[str]:
        """Of all that is averaged."""
        return list(self._current())
