"""The gated convolutions: drop-in subclasses of nn.Conv1d, nn.Conv2d and nn.Conv3d.

Transposed ones are in `conv_transpose`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import autograd
from l0fast.layers.gated import Gated
from l0fast.layers.options import check_options, check_width
from l0fast.maths.hard_concrete import HardConcrete

Convolve = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A convolution as a function of its input, weight and bias."""


class GatedConv(Gated):
    """What the gated convolutions share, transposed or not."""

    groups: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    default_gates = "output"

    def _num_inputs(self) -> int:
        return self.in_channels

    def _gate_shape(self) -> tuple[int, ...]:
        shapes = {
            "input": (self.in_channels // self.units,),
            "output": (self.out_channels,),
            "weight": tuple(self.weight.shape),
        }
        return shapes[self.gates]

    def _mask_columns(self, weight: Tensor, z: Tensor) -> Tensor:
        if self.groups == 1:
            return autograd.scaled_weight(weight, z, 1)
        # Of C channels, c is column c % (C / groups) of the rows of group c // (C / groups).
        weight = weight.unflatten(0, (self.groups, -1))
        gate = z.view(self.groups, 1, -1, *[1] * len(self.kernel_size))
        return (weight * gate).flatten(0, 1)

    def _gated(self, input: Tensor, convolve: Convolve) -> Tensor:
        """convolve(input, weight, bias) with the gates."""
        channels = -1 - len(self.kernel_size)
        if self.noise == "example" and self.training:
            if self.gates == "input":
                check_width(input, channels, self.in_channels)
                input = input * self._example_z(input, channels)
            y = convolve(input, self.weight, self.bias)
            return y * self._example_z(y, channels) if self.gates == "output" else y
        return convolve(*self._parts(input, channels))


class _GatedConv(GatedConv):
    """What L0Conv1d, L0Conv2d and L0Conv3d share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        gates: str = "output",
        density_init: float | None = None,
        droprate_init: float | None = None,
        distribution: HardConcrete | None = None,
        noise: str = "batch",
    ) -> None:
        check_options(gates, density_init, droprate_init, noise)
        self.dense_type.__init__(
            self,  # type: ignore[arg-type]
            in_channels,  # type: ignore[call-arg]
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._init_gates(gates, density_init, droprate_init, distribution, noise)

    def _mask_inputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return self._mask_columns(weight, z)

    def forward(self, input: Tensor) -> Tensor:
        """x [batch, in_channels, *spatial] -> [batch, out_channels, *spatial]."""
        return self._gated(input, self._conv_forward)  # type: ignore[attr-defined]


_CONV_DOC = """nn.{dense} with hard-concrete gates.

    Equals (gates="output", the default):
        z * conv(x, weight, bias)                      # z [out_channels], bias gated too
    With gates="input":
        conv(x * z, weight, bias)                      # z [in_channels]
    With gates="weight":
        conv(x, weight * z, bias)                      # z of the weight's shape

    Any `groups` (depthwise included), padding mode, stride and dilation.

    Args:
        in_channels ... dtype: as in nn.{dense}.
        gates, density_init, droprate_init, distribution, noise: as in `Gated`.

    Raises:
        ValueError, TypeError: an option is out of its range.

    Source: Louizos et al., 2018.
    """


class L0Conv1d(_GatedConv, nn.Conv1d):
    __doc__ = _CONV_DOC.format(dense="Conv1d")
    dense_type = nn.Conv1d


class L0Conv2d(_GatedConv, nn.Conv2d):
    __doc__ = _CONV_DOC.format(dense="Conv2d")
    dense_type = nn.Conv2d


class L0Conv3d(_GatedConv, nn.Conv3d):
    __doc__ = _CONV_DOC.format(dense="Conv3d")
    dense_type = nn.Conv3d
