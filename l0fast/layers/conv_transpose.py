"""The gated transposed convolutions: drop-in subclasses of nn.ConvTranspose1d, 2d and 3d.

Their weight is [in_channels, out_channels / groups, *kernel_size].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import autograd
from l0fast.layers.conv import GatedConv
from l0fast.layers.options import check_options
from l0fast.maths.hard_concrete import HardConcrete

_CONVOLVE: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class _GatedConvTranspose(GatedConv):
    """What L0ConvTranspose1d, L0ConvTranspose2d and L0ConvTranspose3d share."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
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
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        self._init_gates(gates, density_init, droprate_init, distribution, noise)

    def _mask_inputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return autograd.scaled_weight(weight, z, 0)

    def _mask_outputs(self, weight: Tensor, z: Tensor) -> Tensor:
        return self._mask_columns(weight, z)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x [batch, in_channels, *spatial] -> [batch, out_channels, *spatial]."""
        dims = len(self.kernel_size)
        sizes = self.stride, self.padding, self.kernel_size, dims, self.dilation
        added = self._output_padding(input, output_size, *sizes)  # type: ignore[attr-defined]

        def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            how = self.stride, self.padding, added, self.groups, self.dilation
            return _CONVOLVE[dims - 1](x, weight, bias, *how)

        return self._gated(input, convolve)


_DOC = """nn.{dense} with hard-concrete gates.

    Equals (gates="output", the default):
        z * conv_transpose(x, weight, bias)            # z [out_channels], bias gated too
    With gates="input":
        conv_transpose(x * z, weight, bias)            # z [in_channels]
    With gates="weight":
        conv_transpose(x, weight * z, bias)            # z of the weight's shape

    Any `groups`, stride, dilation and `output_padding`; its forward takes `output_size`, too.
    It is always computed with all channels: no training step skips its closed units.

    Args:
        in_channels ... dtype: as in nn.{dense}.
        gates, density_init, droprate_init, distribution, noise: as in `Gated`.

    Raises:
        ValueError, TypeError: an option is out of its range.

    Source: Louizos et al., 2018.
    """


class L0ConvTranspose1d(_GatedConvTranspose, nn.ConvTranspose1d):
    __doc__ = _DOC.format(dense="ConvTranspose1d")
    dense_type = nn.ConvTranspose1d


class L0ConvTranspose2d(_GatedConvTranspose, nn.ConvTranspose2d):
    __doc__ = _DOC.format(dense="ConvTranspose2d")
    dense_type = nn.ConvTranspose2d


class L0ConvTranspose3d(_GatedConvTranspose, nn.ConvTranspose3d):
    __doc__ = _DOC.format(dense="ConvTranspose3d")
    dense_type = nn.ConvTranspose3d
