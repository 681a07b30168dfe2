"""A linear layer over the units that are open, which only the device knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l0fast.autograd.backend import kernels_for
from l0fast.maths import bounded_matmul as products
from l0fast.maths import compaction as orders
from l0fast.maths import packed_weight as weights
from l0fast.maths.compaction import MULTIPLE, Order


def compaction(alive: Tensor, sizes: tuple[int, ...], triton: bool) -> list[Order]:
    """The order of each segment's units (see `l0fast.compaction`), in one launch."""
    if not triton:
        return orders.compaction(alive, sizes)
    index, place, count = _kernels(alive).compaction_forward(alive, sizes)
    parts = zip(index.split(sizes), place.split(sizes), count.split(1), strict=True)
    return [Order(*part) for part in parts]


def _kernels(tensor: Tensor) -> Any:
    kernels = kernels_for(tensor)
    assert kernels is not None
    return kernels


def _pack(
    weight: Tensor,
    z: Tensor | None,
    rows: Order | None,
    cols: Order | None,
    dtype: torch.dtype,
    triton: bool,
) -> Tensor:
    if not triton:
        return weights.pack(weight, z, rows, cols, dtype)
    indexed = (None if order is None else (order.index, order.count) for order in (rows, cols))
    return _kernels(weight).pack(weight.contiguous(), z, *indexed, MULTIPLE, dtype)


def _unpack(
    dpacked: Tensor,
    weight: Tensor,
    z: Tensor | None,
    rows: Order | None,
    cols: Order | None,
    triton: bool,
) -> tuple[Tensor, Tensor | None]:
    if not triton:
        return weights.unpack(dpacked, weight, z, rows, cols)
    placed = (None if order is None else (order.place, order.count) for order in (rows, cols))
    dweight, dz = _kernels(weight).unpack(dpacked, weight.contiguous(), z, *placed)
    return dweight, None if z is None else dz.to(z.dtype)


def _matmul(
    a: Tensor,
    b: Tensor,
    m: Order | None,
    n: Order | None,
    k: Order | None,
    triton: bool,
    bias: Tensor | None = None,
) -> Tensor:
    if not triton:
        return products.bounded_matmul(a, b, m=m, n=n, k=k, bias=bias)
    counts = (None if order is None else order.count for order in (m, n, k))
    index = None if n is None else n.index
    return _kernels(a).bounded_matmul_forward(a, b, *counts, MULTIPLE, bias, index)


class _SkippingLinear(torch.autograd.Function):
    """(x, weight, bias, z) -> y, where x comes, and y goes, with its open units first.

    With W the packed weight (weight * z)[rows][:, cols], over the open units alone:
        y = x W^T + bias[rows]
        dx = dy W
        dweight, dz = unpacked dy^T x
        dbias = sum of dy, put back to its units
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor | None,
        rows: Order | None,
        cols: Order | None,
        triton: bool,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        packed = _pack(weight, z, rows, cols, x.dtype, triton)
        y = _matmul(flat, packed.t(), None, rows, cols, triton, bias)
        ctx.rows, ctx.cols, ctx.triton, ctx.shape = rows, cols, triton, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(flat, packed, weight, z)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, packed, weight, z = ctx.saved_tensors
        rows, cols, triton = ctx.rows, ctx.cols, ctx.triton
        needs_x, needs_weight, needs_bias, needs_z = ctx.needs_input_grad[:4]
        dx = dweight = dbias = dz = None
        dy = dy.reshape(-1, dy.shape[-1]).contiguous()
        if needs_x:
            dx = _matmul(dy, packed, None, cols, rows, triton).view(ctx.shape)
        if needs_weight or needs_z:
            dpacked = _matmul(dy.t(), x, rows, cols, None, triton)
            dweight, dz = _unpack(dpacked, weight, z, rows, cols, triton)
        if needs_bias:
            dbias = dy.sum(0, dtype=ctx.bias_dtype)
            if rows is not None:
                # Selected, not multiplied: beyond the count lies what nobody computed.
                dbias = torch.where(rows.place < rows.count, dbias.index_select(0, rows.place), 0.0)
        return dx, dweight, dbias, dz, None, None, None


def skipping_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    rows: Order | None,
    cols: Order | None,
    triton: bool,
) -> Tensor:
    """The checked call of `functional.skipping_linear`."""
    return _SkippingLinear.apply(x, weight, bias, z, rows, cols, triton)  # type: ignore[return-value]
