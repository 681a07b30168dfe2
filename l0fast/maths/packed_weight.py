"""The open part of a weight, in one corner: the reference of the packed-weight kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from l0fast.maths.compaction import Order


def _moved(weight: Tensor, rows: Order | None, cols: Order | None, inverse: bool) -> Tensor:
    for dim, order in enumerate((rows, cols)):
        if order is not None:
            weight = weight.index_select(dim, order.place if inverse else order.index)
    return weight


def pack(
    weight: Tensor, z: Tensor | None, rows: Order | None, cols: Order | None, dtype: torch.dtype
) -> Tensor:
    """The masked weight with its open rows and columns first: [N, K].

    Equals: (weight * z)[rows.index][:, cols.index], what is open in the first rows and columns. The
    kernel writes nothing beyond the rounded counts, and nobody reads there.

    Args:
        weight: [N, K].
        z: [K], the gates of its columns, or None.
        rows, cols: None stands for all, as they are.
        dtype: of the result.
    """
    masked = weight if z is None else weight * z
    return _moved(masked, rows, cols, inverse=False).to(dtype)


def unpack(
    dpacked: Tensor, weight: Tensor, z: Tensor | None, rows: Order | None, cols: Order | None
) -> tuple[Tensor, Tensor | None]:
    """(dweight [N, K], dz [K] or None) of the packed weight's gradient; the closed get zero.

    Equals, with dmasked the gradient put back to its rows and columns:
        dweight = dmasked * z
        dz = (dmasked * weight).sum(0)
    """
    dmasked = _moved(dpacked, rows, cols, inverse=True)
    for order, shape in ((rows, (-1, 1)), (cols, (1, -1))):
        if order is not None:
            dmasked = torch.where((order.place < order.count).view(shape), dmasked, 0.0)
    dmasked = dmasked.to(torch.promote_types(dpacked.dtype, torch.float32))
    if z is None:
        return dmasked.to(weight.dtype), None
    return (dmasked * z).to(weight.dtype), (dmasked * weight).sum(0).to(z.dtype)
