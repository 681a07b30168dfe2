"""The moving average of a model's weights, which is evaluated and pruned in their place."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from l0fast.layers.handle import gated_layers


class Average:
    """The exponential moving average of the weights and of floating-point buffers (batch norms).

    Equals, after each step, beginning with the values after the first step:
        average = decay * average + (1 - decay) * value

    The gates are not averaged: the constraint holds for the model's own gates, and they decide
    which units stay.

    Args:
        model: only `in_force` changes it.
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
        """Updates the average after a step."""
        current = self._current()
        if not self._values:
            self._values = {name: value.clone() for name, value in current.items()}
            return
        self._update(list(self._values.values()), list(current.values()), 0)
        for name, _ in self._model.named_buffers():
            if name in current:  # the average of -inf (in a mask) would be NaN
                value, average = current[name], self._values[name]
                average.copy_(average.where(value.isfinite(), value))

    @contextmanager
    def in_force(self) -> Generator[None]:
        """Within it the model has the average; afterwards its own values, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Exchanges values and averages, in place: a CUDA graph refers to these tensors."""
        for name, value in self._current().items() if self._values else ():
            kept = value.clone()
            value.copy_(self._values[name])
            self._values[name].copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> average; empty before the first step."""
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads the averages of a state."""
        current = self._current()
        self._values = {name: value.to(current[name], copy=True) for name, value in state.items()}

    def names(self) -> list[str]:
        """The names of the averaged tensors."""
        return list(self._current())
