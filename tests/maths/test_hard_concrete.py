"""The gate's distribution: numbers, closed forms against draws, gradients, extremes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from l0fast import functional
from l0fast.maths.hard_concrete import UNIFORM_EPS, HardConcrete
from tests.helpers.tolerance import rounding_tolerance

DEFAULT = HardConcrete()
OTHER = HardConcrete(temperature=0.4, gamma=-0.3, zeta=1.2)
QUIET = HardConcrete(noise_scale=0.25)
DISTRIBUTIONS = [
    pytest.param(DEFAULT, id="default"),
    pytest.param(OTHER, id="other"),
    pytest.param(QUIET, id="quiet"),
]
DRAWS = 10**6


def formula(log_alpha: Tensor, u: Tensor, d: HardConcrete) -> Tensor:
    """The published equations, with the scale of the noise; nothing else."""
    noise = d.noise_scale * (torch.log(u) - torch.log(1 - u))
    s = 1 / (1 + torch.exp(-(noise + log_alpha) / d.temperature))
    return (s * (d.zeta - d.gamma) + d.gamma).clamp(0, 1)


@pytest.mark.parametrize("d", DISTRIBUTIONS)
def test_gate_is_the_published_equation(d: HardConcrete) -> None:
    log_alpha = 3 * torch.randn(2000, dtype=torch.float64)
    u = torch.rand(2000, dtype=torch.float64).clamp(UNIFORM_EPS, 1 - UNIFORM_EPS)
    z = d.gate(log_alpha, d.logistic_noise(u))
    assert {0.0, 1.0} < set(z.tolist())
    torch.testing.assert_close(z, formula(log_alpha, u, d), rtol=0, atol=1e-13)


@pytest.mark.parametrize("d", DISTRIBUTIONS)
@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 1.7, 4.0])
def test_closed_forms_hold_for_a_million_draws(d: HardConcrete, log_alpha: float) -> None:
    z = functional.hard_concrete(torch.full((DRAWS,), log_alpha), distribution=d).z.double()

    def above(t: Tensor) -> Tensor:  # P(z > t)
        s = (t - d.gamma) / (d.zeta - d.gamma)
        return torch.sigmoid((log_alpha - d.temperature * torch.logit(s)) / d.noise_scale)

    steps = 20_000
    middles = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    mean = float(above(middles).mean())
    second = float((2 * middles * above(middles)).mean())
    ends = above(torch.tensor([0.0, 1.0], dtype=torch.float64))
    p_open = float(ends[0])
    if d.noise_scale == 1:
        exact = d.open_probability(torch.tensor(log_alpha, dtype=torch.float64))
        assert float(exact) == pytest.approx(p_open, abs=1e-12)
    for name, got, expected, deviation in (
        ("P(z = 0)", float((z == 0).double().mean()), 1 - p_open, (p_open * (1 - p_open)) ** 0.5),
        ("P(z = 1)", float((z == 1).double().mean()), float(ends[1]), 0.5),
        ("mean", float(z.mean()), mean, math.sqrt(second - mean**2)),
    ):
        if name == "P(z = 1)":
            deviation = (expected * (1 - expected)) ** 0.5
        assert abs(got - expected) < 4 * deviation / math.sqrt(DRAWS), (name, got, expected)


def test_the_numbers_of_the_defaults() -> None:
    assert DEFAULT.shift == pytest.approx(2 / 3 * math.log(11), abs=1e-12)
    assert DEFAULT.shift == pytest.approx(1.5986, abs=1e-4)
    # Droprate 0.5 means log_alpha = 0: not half of the gates are open, but five in six.
    assert float(DEFAULT.open_probability(torch.tensor(0.0))) == pytest.approx(0.832, abs=5e-4)
    # ±log(100) would floor every gate at 4.71 %; the bound here is far below 0.1 %.
    at_log_100 = DEFAULT.open_probability(torch.tensor(-math.log(100)))
    assert float(at_log_100) == pytest.approx(0.0471, abs=5e-5)
    assert DEFAULT.lowest_density < 0.001
    lowest = DEFAULT.open_probability(torch.tensor(-DEFAULT.bound, dtype=torch.float64))
    assert DEFAULT.lowest_density == pytest.approx(float(lowest), rel=1e-12)


@pytest.mark.parametrize("d", DISTRIBUTIONS)
def test_evaluation_gate_is_the_median(d: HardConcrete) -> None:
    log_alpha = torch.linspace(-4, 4, 801, dtype=torch.float64)
    median = d.median(log_alpha)
    half = torch.full_like(log_alpha, 0.5)
    torch.testing.assert_close(median, formula(log_alpha, half, d), rtol=0, atol=1e-13)
    # Closed exactly where it is more often closed than open, and one from the other edge on.
    open_edge = d.temperature * math.log(-d.gamma / d.zeta)
    one_edge = d.temperature * math.log((1 - d.gamma) / (d.zeta - 1))
    edges = torch.tensor([open_edge, one_edge], dtype=torch.float64)
    for step, expected in ((-1e-6, (True, False)), (1e-6, (False, True))):
        at = d.median(edges + step)
        assert (bool(at[0] == 0), bool(at[1] == 1)) == expected
    assert torch.equal(median == 0, d.open_probability(log_alpha) <= 0.5)


def test_evaluation_gate_is_one_where_log_alpha_is_at_least_the_shift() -> None:
    edge = torch.tensor([DEFAULT.shift - 1e-6, DEFAULT.shift + 1e-6], dtype=torch.float64)
    assert (DEFAULT.median(edge) == 1).tolist() == [False, True]


@pytest.mark.parametrize("d", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [0.001, 0.05, 0.25, 0.5, 0.9, 0.999])
def test_log_alpha_of_a_density_has_that_density(d: HardConcrete, density: float) -> None:
    log_alpha = torch.tensor(d.log_alpha(density), dtype=torch.float64)
    assert float(d.open_probability(log_alpha)) == pytest.approx(density, rel=1e-12)


@pytest.mark.parametrize("density", [1.0, 1e-9, 1 - 1e-12])
def test_log_alpha_of_a_density_stays_within_the_bound(density: float) -> None:
    assert abs(DEFAULT.log_alpha(density)) == DEFAULT.bound


@pytest.mark.parametrize("d", DISTRIBUTIONS)
def test_backwards_are_the_derivatives_of_the_equations(d: HardConcrete) -> None:
    log_alpha = (2 * torch.randn(500, dtype=torch.float64)).requires_grad_()
    u, dz = torch.rand(500, dtype=torch.float64), torch.randn(500, dtype=torch.float64)
    z = formula(log_alpha, u, d)
    (expected,) = torch.autograd.grad(z, log_alpha, dz)
    s = d.concrete(log_alpha.detach(), d.logistic_noise(u))
    p = d.open_probability(log_alpha.detach())
    got = d.backward(dz, z.detach(), s, None, p)
    assert got is not None
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    clamped = (z == 0) | (z == 1)
    assert 0 < int(clamped.sum()) < 500
    assert (got[clamped] == 0).all()
    assert (got[~clamped] != 0).all()

    p = torch.sigmoid(log_alpha - d.temperature * math.log(-d.gamma / d.zeta))
    (expected,) = torch.autograd.grad(p, log_alpha, dz)
    of_open = d.backward(None, z.detach(), s, dz, p.detach())
    torch.testing.assert_close(of_open, expected, rtol=1e-12, atol=1e-15)

    both = d.backward(dz, z.detach(), s, dz, p.detach())
    torch.testing.assert_close(both, got + expected, rtol=1e-9, atol=1e-12)
    assert d.backward(None, z.detach(), s, None, p.detach()) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_extremes_are_exact_and_finite(dtype: torch.dtype) -> None:
    log_alpha = torch.tensor([1e4, -1e4, 1e4, -1e4], dtype=dtype)
    u = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=dtype)
    noise = DEFAULT.logistic_noise(u)
    assert noise.isfinite().all()
    assert noise.dtype == dtype
    z = DEFAULT.gate(log_alpha, noise)
    assert z.tolist() == [1, 0, 1, 0]
    assert DEFAULT.open_probability(log_alpha).tolist() == [1, 0, 1, 0]
    assert DEFAULT.median(log_alpha).tolist() == [1, 0, 1, 0]
    s, p = DEFAULT.concrete(log_alpha, noise), DEFAULT.open_probability(log_alpha)
    gradient = DEFAULT.backward(torch.ones_like(z), z, s, None, p)
    assert gradient is not None
    assert gradient.tolist() == [0, 0, 0, 0]
    assert gradient.dtype == z.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_noise_is_finite_at_both_ends_and_the_logit_between(dtype: torch.dtype) -> None:
    ends = DEFAULT.logistic_noise(torch.tensor([0.0, 1e-9, 1 - 1e-9, 1.0], dtype=torch.float64))
    at_edge = math.log(UNIFORM_EPS) - math.log1p(-UNIFORM_EPS)
    assert ends.tolist() == pytest.approx([at_edge, at_edge, -at_edge, -at_edge])
    u = torch.tensor([0.1, 0.5, 0.75], dtype=dtype)
    expected = torch.tensor([math.log(1 / 9), 0.0, math.log(3)], dtype=dtype)
    torch.testing.assert_close(DEFAULT.logistic_noise(u), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_by_roundings_only(dtype: torch.dtype) -> None:
    log_alpha, noise = (torch.randn(1000).to(dtype) for _ in range(2))
    got = DEFAULT.gate(log_alpha, noise)
    exact = DEFAULT.gate(log_alpha.double(), noise.double())
    # The sum of log_alpha and noise, up to 8 in size, is rounded before the slope of 0.45.
    error = (got.double() - exact).abs()
    assert got.dtype == dtype
    assert (error <= rounding_tolerance(dtype, 4.0)).all()


def test_methods_broadcast_and_leave_their_arguments_alone() -> None:
    log_alpha, noise = torch.randn(3, 1), torch.randn(4)
    kept = log_alpha.clone(), noise.clone()
    s, p = DEFAULT.concrete(log_alpha, noise), DEFAULT.open_probability(log_alpha + 0 * noise)
    z = DEFAULT.gate(log_alpha, noise)
    assert z.shape == (3, 4)
    dz = torch.randn(3, 4)
    arguments = dz, z, s, dz.clone(), p
    kept_backward = [argument.clone() for argument in arguments]
    DEFAULT.backward(*arguments)
    assert torch.equal(log_alpha, kept[0])
    assert torch.equal(noise, kept[1])
    assert all(map(torch.equal, arguments, kept_backward))
    assert DEFAULT.gate(torch.empty(0), torch.empty(0)).shape == (0,)


def test_it_is_a_frozen_value() -> None:
    assert HardConcrete() == DEFAULT
    assert hash(HardConcrete()) == hash(DEFAULT)
    assert DEFAULT != OTHER
    with pytest.raises(dataclasses.FrozenInstanceError, match="temperature"):
        DEFAULT.temperature = 1.0  # type: ignore[misc]
