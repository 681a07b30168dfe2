"""Weights multiplied by their gates: the reference of the gated-weight kernel.

A gate serves one weight, or a slice of them (a row, a column): then `dim` names the dimension of
the weight along which the gates run, and z is broadcast over the others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def along(z: Tensor, weight: Tensor, dim: int | None) -> Tensor:
    """z [weight.shape[dim]] as a view that broadcasts against `weight`; as it is without `dim`."""
    if dim is None:
        return z
    return z.view([-1 if d == dim else 1 for d in range(weight.dim())])


def memory_format(weight: Tensor) -> torch.memory_format:
    """How a masked weight lies in memory: with channels last only if the weight does, which one
    with a single channel or a 1 x 1 kernel does not."""
    last = weight.dim() == 4 and not weight.is_contiguous()
    last = last and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def mask(weight: Tensor, z: Tensor, dim: int | None) -> Tensor:
    """weight * z, each gate over its weights."""
    return torch.mul(weight, along(z, weight, dim))


def mask_backward(
    dmasked: Tensor, weight: Tensor, z: Tensor, dim: int | None
) -> tuple[Tensor, Tensor]:
    """(dweight, dz). Equals: dmasked * z, and dmasked * weight summed over a gate's weights."""
    dweight = torch.mul(dmasked, along(z, weight, dim))
    dz = torch.mul(dmasked, weight)
    if dim is not None and weight.dim() > 1:
        dz = dz.sum([d for d in range(weight.dim()) if d != dim])
    return dweight, dz
