"""Weights multiplied by their gates: the maths, and the op that draws, masks and counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast import autograd, functional
from l0fast.maths.gated_weight import along, mask, mask_backward
from l0fast.maths.hard_concrete import HardConcrete

DEFAULT = HardConcrete()
OTHER = HardConcrete(temperature=0.4, gamma=-0.3, zeta=1.2, noise_scale=0.5)
SHAPE = (4, 3, 2, 5)
DIMS = [None, 0, 1, 2, 3]


def gates_like(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    return shape if dim is None else (shape[dim],)


def naive(weight: Tensor, z: Tensor, dim: int | None) -> Tensor:
    """Slice by slice, with no broadcasting to get wrong."""
    if dim is None:
        return weight * z
    return torch.stack([weight.select(dim, k) * z[k] for k in range(weight.shape[dim])], dim=dim)


@pytest.mark.parametrize("dim", DIMS)
def test_mask_and_its_backward(dim: int | None) -> None:
    weight = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    z = torch.rand(gates_like(SHAPE, dim), dtype=torch.float64, requires_grad=True)
    expected = naive(weight, z, dim)
    assert torch.equal(mask(weight, z, dim), expected)
    dmasked = torch.randn(SHAPE, dtype=torch.float64)
    gradients = torch.autograd.grad(expected, (weight, z), dmasked)
    for got, wanted in zip(
        mask_backward(dmasked, weight.detach(), z.detach(), dim), gradients, strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_square_weight_does_not_hide_the_wrong_dimension(dim: int) -> None:
    weight, z = torch.ones(3, 3, 3), torch.tensor([0.0, 1.0, 2.0])
    expected = torch.tensor([0.0, 9.0, 18.0])
    others = [d for d in range(3) if d != dim]
    assert torch.equal(mask(weight, z, dim).sum(others), expected)
    assert along(z, weight, dim).data_ptr() == z.data_ptr()  # a view


@pytest.mark.parametrize("d", [DEFAULT, OTHER], ids=["default", "other"])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("keep", [(0,), (1,), (0, 1)], ids=["weight", "count", "both"])
def test_gradcheck(dim: int | None, keep: tuple[int, ...], d: HardConcrete) -> None:
    shape = (3, 2, 2, 3)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    log_alpha = torch.randn(gates_like(shape, dim), dtype=torch.float64, requires_grad=True)
    # Closed, open and intermediate gates, away from the kinks whatever log_alpha is.
    middle = -0.9 * log_alpha.detach()
    kind = torch.arange(log_alpha.numel()).view(log_alpha.shape) % 3
    noise = torch.where(kind == 0, middle - 10, torch.where(kind == 1, middle, middle + 10))

    def op(weight: Tensor, log_alpha: Tensor) -> Any:
        out = autograd.gated_weight(weight, log_alpha, noise, dim, d)
        return sum(out[i] for i in keep)  # one backward for all that is kept

    inputs = (weight, log_alpha) if 0 in keep else (weight.detach(), log_alpha)
    assert torch.autograd.gradcheck(op, inputs)


@pytest.mark.parametrize("dim", [*DIMS, -1, -4])
def test_is_hard_concrete_then_a_product(dim: int | None) -> None:
    weight = torch.randn(SHAPE)
    log_alpha = torch.randn(gates_like(SHAPE, dim))
    z, expected_open = functional.hard_concrete(log_alpha, seed=3, step=1, tensor=2)
    masked, count = functional.gated_weight(weight, log_alpha, dim=dim, seed=3, step=1, tensor=2)
    positive = dim if dim is None else dim % 4
    assert torch.equal(masked, naive(weight, z, positive))
    assert count.shape == ()
    torch.testing.assert_close(count, expected_open[0])
    torch.manual_seed(2)
    z = functional.hard_concrete(log_alpha, distribution=OTHER).z
    torch.manual_seed(2)
    masked = functional.gated_weight(weight, log_alpha, dim=dim, distribution=OTHER).weight
    assert torch.equal(masked, naive(weight, z, positive))


@pytest.mark.parametrize("dim", [None, 1])
def test_closed_gates_have_exactly_zero_gradients(dim: int | None) -> None:
    weight = torch.randn(30, 40, requires_grad=True)
    log_alpha = torch.randn(gates_like((30, 40), dim), requires_grad=True)
    z = functional.hard_concrete(log_alpha.detach(), seed=1).z
    masked = functional.gated_weight(weight, log_alpha, dim=dim, seed=1).weight
    dweight, dlog_alpha = torch.autograd.grad(masked, (weight, log_alpha), torch.ones(30, 40))
    closed, inside = z == 0, (z > 0) & (z < 1)
    assert closed.any()
    assert (z == 1).any()
    assert (dlog_alpha[~inside] == 0).all()
    assert (dlog_alpha[inside] != 0).all()
    assert torch.equal(dweight, along(z, weight, dim).expand_as(weight))


@pytest.mark.parametrize("dim", [None, 0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", [torch.float32, None])
def test_half_precision_weights(
    dtype: torch.dtype, gate_dtype: torch.dtype | None, dim: int | None
) -> None:
    gate_dtype = gate_dtype or dtype
    weight = torch.randn(20, 30).to(dtype).requires_grad_()
    log_alpha = torch.randn(gates_like((20, 30), dim)).to(gate_dtype).requires_grad_()
    masked, count = functional.gated_weight(weight, log_alpha, dim=dim, seed=1)
    assert (masked.dtype, count.dtype) == (dtype, torch.float32)
    z = functional.hard_concrete(log_alpha.detach().float(), seed=1).z
    assert torch.equal(masked, naive(weight, z.to(dtype), dim))
    gradients = torch.autograd.grad(masked.float().sum() + count, (weight, log_alpha))
    assert [g.dtype for g in gradients] == [dtype, gate_dtype]
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dim", [None, 0])
def test_empty(dim: int | None) -> None:
    weight = torch.empty(0, 3, requires_grad=True)
    log_alpha = torch.empty(gates_like((0, 3), dim), requires_grad=True)
    masked, count = functional.gated_weight(weight, log_alpha, dim=dim)
    assert masked.shape == (0, 3)
    assert count == 0
    gradients = torch.autograd.grad(masked.sum() + count, (weight, log_alpha))
    assert [g.shape for g in gradients] == [weight.shape, log_alpha.shape]


def test_strides_do_not_matter() -> None:
    weight, log_alpha = torch.randn(SHAPE), torch.randn(SHAPE, requires_grad=True)
    plain = functional.gated_weight(weight, log_alpha, seed=1)
    (expected,) = torch.autograd.grad(plain.weight.sum() + plain.expected_open, log_alpha)
    last = torch.channels_last
    moved = log_alpha.detach().to(memory_format=last).requires_grad_()
    got = functional.gated_weight(weight.to(memory_format=last), moved, seed=1)
    (gradient,) = torch.autograd.grad(got.weight.sum() + got.expected_open, moved)
    assert torch.equal(got.weight, plain.weight)
    torch.testing.assert_close(got.expected_open, plain.expected_open)
    torch.testing.assert_close(gradient, expected)
