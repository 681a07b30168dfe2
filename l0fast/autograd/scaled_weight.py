"""A layer's weight multiplied by gates that were drawn for it."""

from __future__ import annotations

from torch import Tensor

from l0fast.autograd.backend import masks_on_triton
from l0fast.autograd.ops import triton_scaled_weight
from l0fast.maths.gated_weight import mask


def scaled_weight(weight: Tensor, z: Tensor, dim: int) -> Tensor:
    """weight * z, with the gates z [weight.shape[dim]] along dimension `dim`; where the kernel
    runs, in autocast's dtype."""
    if masks_on_triton(weight, z):
        return triton_scaled_weight(weight, z, dim)
    return mask(weight, z, dim)
