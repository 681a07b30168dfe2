"""Autograd Functions over the reference maths: what runs wherever the kernels do not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from l0fast.maths import gated_weight as maths
from l0fast.maths.hard_concrete import HardConcrete

_SEGMENTS: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, Tensor]] = {}


def _segments(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """([L] lengths, [N] the segment of each element), made once for a model."""
    found = None if torch.compiler.is_compiling() else _SEGMENTS.get((sizes, device))
    if found is None:
        lengths = torch.tensor(sizes, device=device)
        places = torch.arange(len(sizes), device=device)
        found = lengths, places.repeat_interleave(lengths, output_size=sum(sizes))
        if not torch.compiler.is_compiling():
            _SEGMENTS[sizes, device] = found
    return found


def segment_sums(probability: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[L] sums over consecutive segments of `probability` [N], in at least float32."""
    if probability.dtype in (torch.float16, torch.bfloat16):
        probability = probability.float()
    if len(sizes) == 1:
        return probability.sum().reshape(1)
    lengths, _ = _segments(sizes, probability.device)
    return torch.segment_reduce(probability, "sum", lengths=lengths, unsafe=True)


def segment_spread(dsums: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[N]: each of `dsums` [L] over its segment; the backward of `segment_sums`."""
    if len(sizes) == 1:
        return dsums.expand(sizes[0])
    _, places = _segments(sizes, dsums.device)
    return dsums.index_select(0, places)


class _HardConcrete(torch.autograd.Function):
    """(log_alpha [N], noise [N]) -> (z [N], expected_open [L])."""

    @staticmethod
    def forward(
        ctx: Any,
        log_alpha: Tensor,
        noise: Tensor,
        sizes: tuple[int, ...],
        distribution: HardConcrete,
    ) -> tuple[Tensor, Tensor]:
        s = distribution.concrete(log_alpha, noise)
        z = distribution.stretched(s)
        probability = distribution.open_probability(log_alpha)
        ctx.sizes, ctx.distribution = sizes, distribution
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, s, probability)
        ctx.spent = False
        return z, segment_sums(probability, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dopen: Tensor | None) -> Any:
        z, s, probability = ctx.saved_tensors
        ctx.spent = True  # for who holds a result of this node and may not use it twice
        spread = None if dopen is None else segment_spread(dopen, ctx.sizes)
        dlog_alpha = ctx.distribution.backward(dz, z, s, spread, probability)
        return dlog_alpha, None, None, None


class _GatedWeight(torch.autograd.Function):
    """(weight, log_alpha, noise) -> (weight * z, expected_open 0-d)."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        log_alpha: Tensor,
        noise: Tensor,
        dim: int | None,
        distribution: HardConcrete,
    ) -> tuple[Tensor, Tensor]:
        s = distribution.concrete(log_alpha, noise)
        z = distribution.stretched(s)
        probability = distribution.open_probability(log_alpha)
        ctx.dim, ctx.distribution = dim, distribution
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, z, s, probability)
        ctx.spent = False
        masked = maths.mask(weight, z.to(weight.dtype), dim)
        return masked, segment_sums(probability.reshape(-1), (probability.numel(),)).view(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmasked: Tensor | None, dopen: Tensor | None) -> Any:
        weight, z, s, probability = ctx.saved_tensors
        ctx.spent = True
        dweight = dz = spread = None
        if dmasked is not None:
            dweight, dz = maths.mask_backward(dmasked, weight, z.to(weight.dtype), ctx.dim)
            dz = dz.to(z.dtype)
        if dopen is not None:
            spread = dopen.to(probability.dtype).expand_as(probability)
        dlog_alpha = ctx.distribution.backward(dz, z, s, spread, probability)
        return dweight, dlog_alpha, None, None, None


class _GatedLinear(torch.autograd.Function):
    """linear(x * z, weight, bias) of an x that needs no gradient: z's is taken from the weight's.

    Where z > 0:  dz[k] = sum_n weight[n, k] * dweight[n, k] / z[k], so that no product is run for
    the gradient of x. Where z == 0 dweight is exactly 0, and so is dz.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
        gated = x * z
        ctx.save_for_backward(gated, weight, z)
        return torch.nn.functional.linear(gated, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        gated, weight, z = ctx.saved_tensors
        _, needs_weight, needs_bias, needs_z = ctx.needs_input_grad
        dweight = dbias = dz = None
        if dy.dim() != 2:
            dy, gated = dy.reshape(-1, dy.shape[-1]), gated.reshape(-1, gated.shape[-1])
        if dy.dtype != gated.dtype:  # under autocast
            gated = gated.to(dy.dtype)
        if needs_weight or needs_z:
            dweight = dy.t().mm(gated)
            if dweight.dtype != weight.dtype:
                dweight = dweight.to(weight.dtype)
        if needs_z:
            assert dweight is not None
            tiny = torch.finfo(z.dtype).tiny
            dz = (weight * dweight).sum(0).div_(z.clamp_min(tiny))
        if needs_bias:
            dbias = dy.sum(0, dtype=weight.dtype)
        return None, dweight, dbias, dz


def _picked(tensor: Tensor, index: Tensor | None, dim: int = 0) -> Tensor:
    return tensor if index is None else tensor.index_select(dim, index)


def _placed(part: Tensor, like: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """Zeros of `like`'s shape with `part` at `rows` of dimension 0 and `cols` of dimension 1."""
    if rows is None and cols is None:
        return part
    whole = torch.zeros_like(like)
    if cols is None:
        assert rows is not None
        return whole.index_copy_(0, rows, part)
    if rows is None:
        return whole.index_copy_(1, cols, part)
    if like.dim() == 2 and whole.is_contiguous():
        index = torch.add(cols, rows.unsqueeze(1), alpha=like.shape[1]).view(-1)
        whole.view(-1).scatter_(0, index, part.reshape(-1))  # twice as fast as two copies
        return whole
    whole[rows.unsqueeze(1), cols] = part
    return whole


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
        part = _picked(_picked(weight, rows), cols, 1)
        gates = _picked(z, rows if dim == 0 else cols)
        masked = maths.mask(part, gates, dim)
        raw = of_bias = None
        if bias is not None:
            raw = bias.view_as(bias) if rows is None else bias.index_select(0, rows)
            of_bias = raw if dim else raw * gates
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, bias, z, part, raw, gates, rows, cols)
        return masked, of_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmasked: Tensor | None, dout: Tensor | None) -> Any:
        weight, bias, z, part, raw, gates, rows, cols = ctx.saved_tensors
        dweight: Tensor | None = None
        dbias: Tensor | None = None
        dz: Tensor | None = None
        if dmasked is not None:
            dpart, dz = maths.mask_backward(dmasked, part, gates, ctx.dim)
            dweight = _placed(dpart, weight, rows, cols)
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


def hard_concrete(
    log_alpha: Tensor, noise: Tensor, sizes: tuple[int, ...], distribution: HardConcrete
) -> tuple[Tensor, Tensor]:
    """The checked call of `functional.hard_concrete` on the torch backend."""
    return _HardConcrete.apply(log_alpha, noise, sizes, distribution)  # type: ignore[return-value]


def gated_weight(
    weight: Tensor,
    log_alpha: Tensor,
    noise: Tensor,
    dim: int | None,
    distribution: HardConcrete,
) -> tuple[Tensor, Tensor]:
    """The checked call of `functional.gated_weight` on the torch backend."""
    return _GatedWeight.apply(weight, log_alpha, noise, dim, distribution)  # type: ignore[return-value]


def gated_linear(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor) -> Tensor:
    """linear(x * z, weight, bias): x [..., K], weight [N, K], bias [N] or None, z [K]."""
    if not x.requires_grad:
        return _GatedLinear.apply(x, weight, bias, z)  # type: ignore[return-value]
    if weight.numel() < x.numel():
        return torch.nn.functional.linear(x, weight * z, bias)
    return torch.nn.functional.linear(x * z, weight, bias)
