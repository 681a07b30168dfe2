"""The gated linear layer: a drop-in subclass of nn.Linear."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import autograd, functional
from l0fast.layers.draw import EVERYTHING, OnDevice
from l0fast.layers.gated import Gated
from l0fast.layers.options import check_options, check_width
from l0fast.maths.hard_concrete import HardConcrete


class L0Linear(Gated, nn.Linear):
    """nn.Linear with hard-concrete gates.

    Equals (gates="input", the default):
        F.linear(x * z, weight, bias)                  # z [in_features]
    With gates="output":
        F.linear(x, weight * z[:, None], bias * z)     # z [out_features]
    With gates="weight":
        F.linear(x, weight * z, bias)                  # z [out_features, in_features]

    With gates on inputs or single weights the bias is neither gated nor counted.

    Args:
        in_features, out_features, bias, device, dtype: as in nn.Linear.
        gates, density_init, droprate_init, distribution, noise: as in `Gated`.

    Raises:
        ValueError, TypeError: an option is out of its range.

    Source: Louizos et al., 2018.

    >>> l0fast.L0Linear(8, 4).log_alpha.shape  # a gate on each input
    torch.Size([8])
    """

    dense_type = nn.Linear
    default_gates = "input"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gates: str = "input",
        density_init: float | None = None,
        droprate_init: float | None = None,
        distribution: HardConcrete | None = None,
        noise: str = "batch",
    ) -> None:
        check_options(gates, density_init, droprate_init, noise)
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._init_gates(gates, density_init, droprate_init, distribution, noise)

    def _num_inputs(self) -> int:
        return self.in_features

    def _gate_shape(self) -> tuple[int, ...]:
        shapes = {
            "input": (self.in_features // self.units,),
            "output": (self.out_features,),
            "weight": tuple(self.weight.shape),
        }
        return shapes[self.gates]

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.noise == "example" and self.training:
            if self.gates == "input":
                check_width(input, -1, self.in_features)
                return F.linear(input * self._example_z(input, -1), self.weight, self.bias)
            y = F.linear(input, self.weight, self.bias)
            return y * self._example_z(y, -1)
        if self.gates == "input" and not self.training:
            check_width(input, -1, self.in_features)
            return F.linear(input * self._z(), self.weight, self.bias)
        compact = self._compact_here()
        if isinstance(compact, OnDevice):
            return functional.skipping_linear(
                input, self.weight, self.bias, self._z(), **compact._asdict()
            )
        if self.gates == "input":
            part = compact or EVERYTHING
            if compact is None:
                check_width(input, -1, self.in_features)
            return autograd.gated_linear(input, self.weight, self.bias, self._z(), *part)
        return F.linear(*self._parts(input, -1))
