"""torch.library ops over the Triton kernels.

`l0fast::hard_concrete`, `l0fast::gated_weight` and `l0fast::scaled_weight`, each with a backward
op. All are functions of their inputs alone: the noise is named by `state`, three int64 on the
device (seed, step, tensor), so that torch.compile traces them once and for all steps, a checkpoint
replays them, and the backward draws the same noise again. Where no kernel can run, an op computes
the same with the reference maths (that is also how it is checked without a GPU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from l0fast.autograd import direct
from l0fast.autograd.backend import kernels_for
from l0fast.autograd.functions import segment_spread, segment_sums
from l0fast.maths import gated_weight as maths
from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete


def triton_hard_concrete(
    log_alpha: Tensor, state: Tensor, sizes: tuple[int, ...], distribution: HardConcrete
) -> tuple[Tensor, Tensor]:
    """The checked call of `functional.hard_concrete` on the Triton backend."""
    return _draw(log_alpha, state, sizes, *distribution.numbers)


def triton_gated_weight(
    weight: Tensor,
    log_alpha: Tensor,
    state: Tensor,
    dim: int | None,
    distribution: HardConcrete,
) -> tuple[Tensor, Tensor]:
    """The checked call of `functional.gated_weight` on the Triton backend.

    Under autocast the result has autocast's dtype: the pass that masks is also the cast.
    """
    dtype = _result_dtype(weight)
    if dim is None:
        return _gated_weight(weight, log_alpha, state, dtype, *distribution.numbers)
    sizes = (log_alpha.numel(),)
    z, expected_open = _draw(log_alpha, state, sizes, *distribution.numbers)
    return _scale(weight, z, dim, dtype), expected_open.view(())


def triton_scaled_weight(weight: Tensor, z: Tensor, dim: int) -> Tensor:
    """weight * z over dimension `dim`, on the Triton backend; in autocast's dtype, if it is on."""
    return _scale(weight, z, dim, _result_dtype(weight))


def _result_dtype(weight: Tensor) -> torch.dtype:
    device_type = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return weight.dtype


def _noise(log_alpha: Tensor, state: Tensor, distribution: HardConcrete) -> Tensor:
    uniform = philox.uniform(log_alpha.numel(), state[0], state[1], state[2], log_alpha.device)
    return distribution.logistic_noise(uniform).view(log_alpha.shape)


@direct.op("l0fast::hard_concrete")
def _hard_concrete(
    log_alpha: Tensor,
    state: Tensor,
    sizes: Sequence[int],
    temperature: float,
    gamma: float,
    zeta: float,
    noise_scale: float,
) -> tuple[Tensor, Tensor]:
    sizes = tuple(sizes)
    if kernels := kernels_for(log_alpha):
        c = kernels.constants(temperature, gamma, zeta, noise_scale)
        return kernels.hard_concrete_forward(log_alpha, state, sizes, c)
    distribution = HardConcrete(temperature, gamma, zeta, noise_scale=noise_scale)
    z = distribution.gate(log_alpha, _noise(log_alpha, state, distribution))
    return z, segment_sums(distribution.open_probability(log_alpha), sizes)


@direct.op("l0fast::hard_concrete_backward")
def _hard_concrete_backward(
    dz: Tensor | None,
    dopen: Tensor | None,
    log_alpha: Tensor,
    state: Tensor,
    sizes: Sequence[int],
    temperature: float,
    gamma: float,
    zeta: float,
    noise_scale: float,
) -> Tensor:
    sizes = tuple(sizes)
    if kernels := kernels_for(log_alpha):
        c = kernels.constants(temperature, gamma, zeta, noise_scale)
        return kernels.hard_concrete_backward(dz, dopen, log_alpha, state, sizes, c)
    distribution = HardConcrete(temperature, gamma, zeta, noise_scale=noise_scale)
    s = distribution.concrete(log_alpha, _noise(log_alpha, state, distribution))
    spread = None if dopen is None else segment_spread(dopen, sizes)
    probability = distribution.open_probability(log_alpha)
    dlog_alpha = distribution.backward(dz, distribution.stretched(s), s, spread, probability)
    return torch.zeros_like(log_alpha) if dlog_alpha is None else dlog_alpha


@torch.library.custom_op("l0fast::gated_weight", mutates_args=())
def _gated_weight(
    weight: Tensor,
    log_alpha: Tensor,
    state: Tensor,
    dtype: torch.dtype,
    temperature: float,
    gamma: float,
    zeta: float,
    noise_scale: float,
) -> tuple[Tensor, Tensor]:
    if kernels := kernels_for(weight):
        c = kernels.constants(temperature, gamma, zeta, noise_scale)
        return kernels.gated_weight_forward(weight, log_alpha, state, c, dtype)
    distribution = HardConcrete(temperature, gamma, zeta, noise_scale=noise_scale)
    z = distribution.gate(log_alpha, _noise(log_alpha, state, distribution))
    masked = (weight * z).to(dtype).contiguous()
    return masked, distribution.open_probability(log_alpha).sum()


@torch.library.custom_op("l0fast::gated_weight_backward", mutates_args=())
def _gated_weight_backward(
    dmasked: Tensor,
    dopen: Tensor | None,
    weight: Tensor,
    log_alpha: Tensor,
    state: Tensor,
    temperature: float,
    gamma: float,
    zeta: float,
    noise_scale: float,
) -> tuple[Tensor, Tensor]:
    if kernels := kernels_for(weight):
        c = kernels.constants(temperature, gamma, zeta, noise_scale)
        return kernels.gated_weight_backward(dmasked, dopen, weight, log_alpha, state, c)
    distribution = HardConcrete(temperature, gamma, zeta, noise_scale=noise_scale)
    s = distribution.concrete(log_alpha, _noise(log_alpha, state, distribution))
    z = distribution.stretched(s)
    dweight, dz = maths.mask_backward(dmasked.float(), weight.float(), z, None)
    probability = distribution.open_probability(log_alpha)
    spread = None if dopen is None else dopen.expand_as(probability)
    dlog_alpha = distribution.backward(dz, z, s, spread, probability)
    assert dlog_alpha is not None
    return dweight.to(weight.dtype).contiguous(), dlog_alpha.contiguous()


@direct.op("l0fast::scaled_weight")
def _scaled_weight(weight: Tensor, z: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    if kernels := kernels_for(weight):
        return kernels.scaled_weight_forward(weight, z, dim, dtype)
    layout = maths.memory_format(weight)
    return maths.mask(weight, z, dim).to(dtype).contiguous(memory_format=layout)


@direct.op("l0fast::scaled_weight_backward")
def _scaled_weight_backward(
    dscaled: Tensor, weight: Tensor, z: Tensor, dim: int
) -> tuple[Tensor, Tensor]:
    if kernels := kernels_for(weight):
        return kernels.scaled_weight_backward(dscaled, weight, z, dim)
    dweight, dz = maths.mask_backward(dscaled.float(), weight.float(), z, dim)
    layout = maths.memory_format(weight)
    return dweight.to(weight.dtype).contiguous(memory_format=layout), dz


def _laid_out_like(weight: Tensor, dtype: torch.dtype) -> Tensor:
    layout = maths.memory_format(weight)
    return torch.empty(weight.shape, dtype=dtype, device=weight.device, memory_format=layout)


def _contiguous_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.new_empty(tensor.shape, dtype=dtype)


@_hard_concrete.register_fake
def _(log_alpha: Tensor, state: Tensor, sizes: Sequence[int], *_: float) -> Any:
    return _contiguous_like(log_alpha), log_alpha.new_empty(len(sizes))


@_hard_concrete_backward.register_fake
def _(dz: Tensor | None, dopen: Tensor | None, log_alpha: Tensor, *_: Any) -> Any:
    return _contiguous_like(log_alpha)


@_gated_weight.register_fake
def _(weight: Tensor, log_alpha: Tensor, state: Tensor, dtype: torch.dtype, *_: float) -> Any:
    return _contiguous_like(weight, dtype), log_alpha.new_empty(())


@_gated_weight_backward.register_fake
def _(dmasked: Tensor, dopen: Tensor | None, weight: Tensor, log_alpha: Tensor, *_: Any) -> Any:
    return _contiguous_like(weight), _contiguous_like(log_alpha)


@_scaled_weight.register_fake
def _(weight: Tensor, z: Tensor, dim: int, dtype: torch.dtype) -> Any:
    return _laid_out_like(weight, dtype)


@_scaled_weight_backward.register_fake
def _(dscaled: Tensor, weight: Tensor, z: Tensor, dim: int) -> Any:
    return _laid_out_like(weight, weight.dtype), _contiguous_like(z)


def _save(tensors: int) -> Callable[..., None]:
    """setup_context that saves so many of the inputs, and keeps the rest as they are."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.rest = inputs[tensors:]

    return setup_context


def _hard_concrete_gradient(
    backward: Any, ctx: Any, dz: Tensor | None, dopen: Tensor | None
) -> Any:
    log_alpha, state = ctx.saved_tensors
    ctx.spent = True  # as in `functions`
    dlog_alpha = None
    if dz is not None or dopen is not None:
        dlog_alpha = backward(dz, dopen, log_alpha, state, *ctx.rest)
    return dlog_alpha, None, None, None, None, None, None


def _gated_weight_gradient(ctx: Any, dmasked: Tensor | None, dopen: Tensor | None) -> Any:
    weight, log_alpha, state = ctx.saved_tensors
    ctx.spent = True
    numbers = ctx.rest[1:]
    dweight = dlog_alpha = None
    if dmasked is not None:
        dweight, dlog_alpha = _gated_weight_backward(
            dmasked, dopen, weight, log_alpha, state, *numbers
        )
    elif dopen is not None:
        # Only the penalty is in use: the gates are those of one segment.
        flat, sizes = log_alpha.reshape(-1), (log_alpha.numel(),)
        dlog_alpha = _hard_concrete_backward(
            None, dopen.view(1), flat, state, sizes, *numbers
        ).view(log_alpha.shape)
    return dweight, dlog_alpha, None, None, None, None, None, None


def _scaled_weight_gradient(backward: Any, ctx: Any, dscaled: Tensor | None) -> Any:
    weight, z = ctx.saved_tensors
    dim, _ = ctx.rest
    if dscaled is None:
        return None, None, None, None
    return *backward(dscaled, weight, z, dim), None, None


_gated_weight.register_autograd(_gated_weight_gradient, setup_context=_save(3))
_draw = direct.function(_hard_concrete, _hard_concrete_backward, _hard_concrete_gradient, _save(2))
_scale = direct.function(_scaled_weight, _scaled_weight_backward, _scaled_weight_gradient, _save(2))


def _refuse_second_derivative(ctx: Any, *gradients: Tensor) -> NoReturn:
    raise RuntimeError("l0fast: gates have no second derivative; create_graph must be False")


def _loop(op: Any) -> Callable[..., Any]:
    """vmap by one call for each example: each is a function of its own state and log_alpha."""

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        def example(i: int) -> Any:
            pairs = zip(arguments, in_dims, strict=True)
            # A list of sizes has a list of dimensions, all None.
            return op(*(a.select(dim, i) if isinstance(dim, int) else a for a, dim in pairs))

        results = [example(i) for i in range(info.batch_size)]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(part) for part in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


for _backward in (_hard_concrete_backward, _gated_weight_backward, _scaled_weight_backward):
    _backward.register_autograd(_refuse_second_derivative)
    _backward.register_vmap(_loop(_backward))
for _forward in (_hard_concrete, _gated_weight, _scaled_weight):
    _forward.register_vmap(_loop(_forward))
