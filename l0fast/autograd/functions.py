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
