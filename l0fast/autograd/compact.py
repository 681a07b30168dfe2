"""Autograd Functions of gated layers: a linear layer, or the weight of any, of what is open."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l0fast.autograd.backend import masks_on_triton
from l0fast.autograd.ops import triton_scaled_weight
from l0fast.maths import gated_weight as maths


def _picked(tensor: Tensor, index: Tensor | None, dim: int = 0) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _part(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(weight[rows][:, cols], where its elements lie in the flat weight if it is of both)."""
    if rows is None or cols is None or weight.dim() != 2 or not weight.is_contiguous():
        return _picked(_picked(weight, rows), cols, 1), None
    places = torch.add(cols, rows.unsqueeze(1), alpha=weight.shape[1])
    return weight.view(-1).index_select(0, places.view(-1)).view(places.shape), places


def _placed(
    part: Tensor,
    like: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    places: Tensor | None = None,
) -> Tensor:
    """Zeros of `like`'s shape with `part` at `rows` of dimension 0 and `cols` of dimension 1."""
    if rows is None and cols is None:
        return part
    whole = torch.zeros_like(like)
    if places is not None:
        # Twice as fast as two copies.
        whole.view(-1).scatter_(0, places.view(-1), part.reshape(-1))
        return whole
    if cols is None:
        assert rows is not None
        return whole.index_copy_(0, rows, part)
    if rows is None:
        return whole.index_copy_(1, cols, part)
    whole[rows.unsqueeze(1), cols] = part
    return whole


class _GatedLinear(torch.autograd.Function):
    """linear(x * z, weight, bias) of an x that needs no gradient: z's is taken from the weight's.

    Of the rows and columns that are open, as in `_CompactWeight`; `gather` picks the columns out
    of x where more arrives. Where z > 0:  dz[k] = sum_n weight[n, k] * dweight[n, k] / z[k], so
    that no product is run for the gradient of x. Where z == 0 dweight is exactly 0, and so is dz.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor,
        rows: Tensor | None,
        cols: Tensor | None,
        gather: Tensor | None,
    ) -> Tensor:
        part, places = _part(weight, rows, cols)
        gates = _picked(z, cols)
        gated = _picked(x, gather, -1) * gates
        ctx.save_for_backward(gated, weight, bias, z, part, gates, rows, cols, places)
        bias_part = None if bias is None else _picked(bias, rows)
        return torch.nn.functional.linear(gated, part, bias_part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        gated, weight, bias, z, part, gates, rows, cols, places = ctx.saved_tensors
        _, needs_weight, needs_bias, needs_z = ctx.needs_input_grad[:4]
        dweight = dbias = dz = None
        if dy.dim() != 2:
            dy, gated = dy.reshape(-1, dy.shape[-1]), gated.reshape(-1, gated.shape[-1])
        if dy.dtype != gated.dtype:  # under autocast
            gated = gated.to(dy.dtype)
        if needs_weight or needs_z:
            dpart = dy.t().mm(gated)
            if dpart.dtype != weight.dtype:
                dpart = dpart.to(weight.dtype)
            if needs_z:
                tiny = torch.finfo(z.dtype).tiny
                dz = (part * dpart).sum(0).div_(gates.clamp_min(tiny))
                dz = _placed(dz, z, cols, None)
            if needs_weight:
                dweight = _placed(dpart, weight, rows, cols, places)
        if needs_bias:
            dbias = _placed(dy.sum(0, dtype=weight.dtype), bias, rows, None)
        return None, dweight, dbias, dz, None, None, None


class _CompactWeight(torch.autograd.Function):
    """(weight, bias, z) -> the masked weight and bias of the rows and columns that are open.

    What is left out gets exactly zero gradient, as a closed gate gives it when masked.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        z: Tensor,
        dim: int,
        rows: Tensor | None,
        cols: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        part, places = _part(weight, rows, cols)
        gates = _picked(z, rows if dim == 0 else cols)
        masked = maths.mask(part, gates, dim)
        raw = of_bias = None
        if bias is not None:
            raw = bias.view_as(bias) if rows is None else bias.index_select(0, rows)
            of_bias = raw if dim else raw * gates
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, bias, z, part, raw, gates, rows, cols, places)
        return masked, of_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmasked: Tensor | None, dout: Tensor | None) -> Any:
        weight, bias, z, part, raw, gates, rows, cols, places = ctx.saved_tensors
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        dz: Tensor | None = None
        if dmasked is not None:
            dpart, dz = maths.mask_backward(dmasked, part, gates, ctx.dim)
            dweight = _placed(dpart, weight, rows, cols, places)
        if dout is not None:
            if not ctx.dim:
                dz = dout * raw if dz is None else dz.add_(dout * raw)
                dout = torch.mul(dout, gates)
            dbias = _placed(dout, bias, rows, None)
        if dz is not None:
            dz = _placed(dz, z, rows if ctx.dim == 0 else cols, None)
        return dweight, dbias, dz, None, None, None


class _Gather(torch.autograd.Function):
    """x.index_select(dim, index) of an index that names no position twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.dim, ctx.size = dim, x.shape[dim]
        return x.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        # In ops of autograd: it lies on the way to the input, whose gradient may be in the loss.
        (index,) = ctx.saved_tensors
        shape = list(dy.shape)
        shape[ctx.dim] = ctx.size
        return dy.new_zeros(shape).index_copy(ctx.dim, index, dy), None, None


def gather(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x at the positions `index` (none twice) of `dim`."""
    return _Gather.apply(x, index, dim)  # type: ignore[return-value]


def compact_weight(
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    dim: int,
    rows: Tensor | None,
    cols: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The masked weight [R, C, ...] and bias [R] of some rows and columns.

    Equals: (weight * z)[rows][:, cols] and bias[rows], z along `dim` of the weight; with dim 0 the
    bias is masked too. None stands for all rows, or all columns.
    """
    return _CompactWeight.apply(weight, bias, z, dim, rows, cols)  # type: ignore[return-value]


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    gather: Tensor | None = None,
) -> Tensor:
    """linear(x * z, weight, bias): x [..., K], weight [N, K], bias [N] or None, z [K].

    With `rows` and `cols` of these outputs and inputs alone (None stands for all); `gather` says
    where the inputs lie in x, if more arrives.
    """
    whole = rows is None and cols is None
    small = not x.requires_grad or weight.numel() < x.numel()
    if whole and small and gather is None and masks_on_triton(weight, z):
        # Fewer launches than any other way, and no product for the gradient of x either.
        return torch.nn.functional.linear(x, triton_scaled_weight(weight, z, 1), bias)
    if not x.requires_grad:
        return _GatedLinear.apply(x, weight, bias, z, rows, cols, gather)  # type: ignore[return-value]
    if not whole:
        if gather is not None:
            x = _Gather.apply(x, gather, -1)  # type: ignore[assignment]
        part = _CompactWeight.apply(weight, bias, z, 1, rows, cols)
        return torch.nn.functional.linear(x, *part)  # type: ignore[misc]
    if small:
        return torch.nn.functional.linear(x, maths.mask(weight, z, 1), bias)
    return torch.nn.functional.linear(x * z, weight, bias)
