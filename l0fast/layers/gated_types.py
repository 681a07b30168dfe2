"""Which gated layer stands for which dense one."""

from __future__ import annotations

from typing import Any

from torch import nn

from l0fast.layers.conv import L0Conv1d, L0Conv2d, L0Conv3d
from l0fast.layers.conv_transpose import L0ConvTranspose1d, L0ConvTranspose2d, L0ConvTranspose3d
from l0fast.layers.dense_types import is_in_out, kind_of
from l0fast.layers.in_out import L0InOut
from l0fast.layers.linear import L0Linear

GATED_TYPES: dict[type[nn.Module], type[Any]] = {
    gated.dense_type: gated
    for gated in (
        *(L0Linear, L0Conv1d, L0Conv2d, L0Conv3d),
        *(L0ConvTranspose1d, L0ConvTranspose2d, L0ConvTranspose3d),
    )
}


def gated_type_of(layer: nn.Module) -> type[Any]:
    """The gated class that stands for a dense layer."""
    return L0InOut if is_in_out(layer) else GATED_TYPES[kind_of(layer)]
