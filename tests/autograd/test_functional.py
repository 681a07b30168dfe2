"""The stateless door: `hard_concrete`, its noise, its segments and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast import autograd, functional
from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete

DEFAULT = HardConcrete()
OTHER = HardConcrete(temperature=0.4, gamma=-0.3, zeta=1.2, noise_scale=0.5)
SIZES = (5, 0, 1, 14)
N = sum(SIZES)


def locations(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (1.5 * torch.randn(shape)).to(dtype).requires_grad_()


def smooth_noise(log_alpha: Tensor, d: HardConcrete) -> Tensor:
    """Noise for open, closed and intermediate gates, none of them at a kink."""
    noise = 2 * torch.randn_like(log_alpha)
    s = torch.sigmoid((log_alpha + noise).detach() / d.temperature) * (d.zeta - d.gamma) + d.gamma
    kink = (s.abs() < 1e-3) | ((s - 1).abs() < 1e-3)
    assert {0.0, 1.0} <= set(s.clamp(0, 1).tolist())
    return torch.where(kink, -log_alpha.detach(), noise)  # there s = 1/2


@pytest.mark.parametrize("d", [DEFAULT, OTHER], ids=["default", "other"])
@pytest.mark.parametrize("keep", [(0,), (1,), (0, 1)], ids=["z", "count", "both"])
def test_gradcheck(d: HardConcrete, keep: tuple[int, ...]) -> None:
    log_alpha = locations(N)
    noise = smooth_noise(log_alpha, d)

    def op(log_alpha: Tensor) -> Any:
        out = autograd.hard_concrete(log_alpha, noise, SIZES, d)
        return sum(out[i].exp().sum() for i in keep)  # one backward for all that is kept

    assert torch.autograd.gradcheck(op, (log_alpha,))


@pytest.mark.parametrize("shape", [(), (7,), (3, 4)])
def test_equals_its_docstring(shape: tuple[int, ...]) -> None:
    log_alpha = locations(*shape, dtype=torch.float32)
    torch.manual_seed(3)
    z, expected_open = functional.hard_concrete(log_alpha, distribution=OTHER)
    torch.manual_seed(3)
    u = torch.rand_like(log_alpha)
    assert torch.equal(z, OTHER.gate(log_alpha, torch.logit(u, eps=1e-6)))
    total = OTHER.open_probability(log_alpha).sum().view(1)
    torch.testing.assert_close(expected_open, total)


def test_each_segment_has_its_count_and_its_gradient() -> None:
    log_alpha = locations(N)
    z, expected_open = functional.hard_concrete(log_alpha, SIZES)
    parts = DEFAULT.open_probability(log_alpha).split(list(SIZES))
    torch.testing.assert_close(expected_open, torch.stack([part.sum() for part in parts]))
    assert expected_open[1] == 0

    weights, dz = torch.randn(len(SIZES)).double(), torch.randn(N).double()
    (got,) = torch.autograd.grad((expected_open @ weights, z @ dz), log_alpha)
    p = torch.cat(parts).detach()
    of_counts = weights.repeat_interleave(torch.tensor(SIZES)) * p * (1 - p)
    s = (z.detach() - DEFAULT.gamma) / (DEFAULT.zeta - DEFAULT.gamma)
    of_gates = DEFAULT.backward(dz, z.detach(), s, None, p)
    assert of_gates is not None
    torch.testing.assert_close(got, of_counts + of_gates)


def test_clamped_gates_have_exactly_zero_gradient() -> None:
    log_alpha = (3 * torch.randn(4000)).requires_grad_()
    z = functional.hard_concrete(log_alpha).z
    (gradient,) = torch.autograd.grad(z.sum(), log_alpha)
    for end in (0, 1):
        assert (z == end).sum() > 500
        assert (gradient[z == end] == 0).all()
    assert (gradient[(z > 0) & (z < 1)] > 0).all()


def test_a_seed_names_the_noise() -> None:
    log_alpha = locations(9)
    z = functional.hard_concrete(log_alpha, seed=5, step=2, tensor=1).z
    torch.rand(3)  # torch's generator plays no part
    again = functional.hard_concrete(log_alpha, (4, 5), seed=5, step=2, tensor=1).z
    assert torch.equal(z, again)
    noise = torch.logit(philox.uniform(9, 5, 2, 1).double(), eps=1e-6)
    assert torch.equal(z, DEFAULT.gate(log_alpha, noise))
    for other in ({"seed": 6}, {"step": 3}, {"tensor": 0}):
        words: dict[str, Any] = {"seed": 5, "step": 2, "tensor": 1, **other}
        assert not torch.equal(z, functional.hard_concrete(log_alpha, **words).z)
    before = torch.get_rng_state()
    functional.hard_concrete(log_alpha, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torchs_generator_governs() -> None:
    log_alpha = locations(50)
    torch.manual_seed(1)
    first, second = (functional.hard_concrete(log_alpha).z for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(functional.hard_concrete(log_alpha).z, first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    log_alpha = locations(3000, dtype=dtype)
    gates = functional.hard_concrete(log_alpha, (1000, 2000), seed=1)
    assert gates.z.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert gates.expected_open.dtype == wide
    # Half-precision gates are float32's, rounded once; the count is not a sum in half precision.
    exact = functional.hard_concrete(log_alpha.detach().to(wide), (1000, 2000), seed=1)
    assert torch.equal(gates.z, exact.z.to(dtype))
    assert torch.equal(gates.expected_open, exact.expected_open)
    gradients = torch.autograd.grad((gates.z.sum(), gates.expected_open.sum()), log_alpha)
    assert gradients[0].dtype == dtype
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_extremes(value: float) -> None:
    log_alpha = torch.full((1000,), value, requires_grad=True)
    z, expected_open = functional.hard_concrete(log_alpha)
    end = float(value > 0)
    assert (z == end).all()
    assert expected_open.tolist() == [1000 * end]
    (gradient,) = torch.autograd.grad(z.sum() + expected_open.sum(), log_alpha)
    assert (gradient == 0).all()


@pytest.mark.parametrize("sizes", [None, (0,), (0, 0)])
def test_empty(sizes: tuple[int, ...] | None) -> None:
    log_alpha = torch.empty(0, requires_grad=True)
    z, expected_open = functional.hard_concrete(log_alpha, sizes)
    assert z.shape == (0,)
    assert expected_open.tolist() == [0.0] * len(sizes or (0,))
    (gradient,) = torch.autograd.grad(z.sum() + expected_open.sum(), log_alpha)
    assert gradient.shape == (0,)


def test_strides_do_not_matter() -> None:
    log_alpha = torch.randn(6, 8)
    plain = functional.hard_concrete(log_alpha.t().contiguous(), seed=1)
    strided = functional.hard_concrete(log_alpha.t(), seed=1)
    expanded = functional.hard_concrete(log_alpha[:1].expand(8, -1), seed=1)
    assert torch.equal(strided.z, plain.z)
    torch.testing.assert_close(strided.expected_open, plain.expected_open)
    assert len(expanded.z.unique(dim=0)) == 8  # every copy is drawn by itself


def test_auto_is_the_reference_on_a_cpu() -> None:
    log_alpha = locations(9)
    auto, torchs = (
        functional.hard_concrete(log_alpha, seed=1, backend=backend)
        for backend in ("auto", "torch")
    )
    assert torch.equal(auto.z, torchs.z)
    assert torch.equal(auto.expected_open, torchs.expected_open)
