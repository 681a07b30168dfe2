"""The penalty: a module whose call is the term to add to the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.constraints.term import DensityTerm
from l0fast.graph.calls import unwrapped
from l0fast.layers.handle import gates
from l0fast.measures.groups import WHOLE_MODEL, Group, gated_parameters


class L0Penalty(DensityTerm):
    """The penalised baseline: a fixed price on the density.

    Attach it to the optimizer, or add its call to the loss.

    Equals, without `num_examples`:
        coefficient * density
    with it (the unit of Louizos et al., whose loss is a mean over N examples):
        coefficient / num_examples * expected_L0

    The published method draws its gates from the first step, with all of their noise:
    `attach(optimizer, start=0)` does that.

    Args:
        model: a model with gates.
        coefficient: the price, >= 0. On the MLP 784-300-100, a coefficient of 0.1 with
            num_examples=60000 is the same as 0.44 without `num_examples`.
        num_examples: number of training examples N, >= 1, or None.

    Raises:
        ValueError, TypeError: a number is out of its range, or the model has no gates.

    Source: Louizos et al., 2018.

    >>> layer = l0fast.L0Linear(8, 4, density_init=0.5)
    >>> l0fast.L0Penalty(layer, 0.1)().item()  # 0.1 * density
    0.0500...
    """

    coefficient: Tensor

    def __init__(
        self, model: nn.Module, coefficient: float, num_examples: int | None = None
    ) -> None:
        coefficient = _checks.number("coefficient", coefficient, "a number >= 0", low=0.0)
        model = unwrapped(model)
        layers = gates(model).layers
        super().__init__(model, [Group(tuple(layers))])
        if num_examples is not None:
            _checks.whole("num_examples", num_examples)
            coefficient *= gated_parameters(list(layers.values())) / num_examples
        place: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        self.register_buffer("coefficient", torch.tensor(coefficient, **place))
        self.names = (WHOLE_MODEL,)
        self._take_over()

    def value(self) -> Tensor:
        """0-d: coefficient * density; 0 while all gates are open at the start, and once they are
        settled."""
        if self.settled or self.starting:
            return torch.zeros_like(self.coefficient)
        return self.coefficient * self.densities().squeeze(0)
