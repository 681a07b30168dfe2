"""The kernels of l0fast_kernels.gated_weight, against float64 truth and the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import (
    DISTRIBUTION,
    DTYPES,
    OTHER,
    SEED,
    SIZES,
    STEP,
    TENSOR,
    assert_written,
    constants,
    gate,
    gate_and_slope,
    guarded,
    noise,
    open_probability,
    state,
)

KINDS = [
    *(pytest.param(*kind.values, DISTRIBUTION, id=kind.id) for kind in DTYPES),
    pytest.param(torch.float32, torch.float32, OTHER, id="fp32-other"),
]
# A multiple of 16 has a kernel of its own, with whole 128-bit accesses.
ALL_SIZES = [*SIZES, 4096 + 16]


@kernel_test
@pytest.mark.parametrize(("dtype", "out_dtype", "distribution"), KINDS)
@pytest.mark.parametrize("n", ALL_SIZES)
def test_forward_is_no_more_wrong_than_the_reference(
    n: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    distribution: HardConcrete,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from l0fast_kernels import gated_weight_forward, launch

    weight = torch.randn(n, device=DEVICE).to(dtype)
    log_alpha = 2 * torch.randn(n, device=DEVICE)
    with guarded(launch, monkeypatch):
        out, expected_open = gated_weight_forward(
            weight, log_alpha, state(DEVICE), constants(distribution), out_dtype
        )
    assert_written(out, expected_open)

    weight, log_alpha = weight.cpu(), log_alpha.cpu()
    z_true, _, _ = gate_and_slope(log_alpha, distribution)
    p_true, _ = open_probability(log_alpha, distribution)
    z = distribution.gate(log_alpha, noise(n, torch.float32, distribution))
    truth = weight.double() * z_true
    # Rounding to the result's dtype is relative to the result (the interpreter truncates bfloat16,
    # where the chip rounds to nearest), the gate's own error to the width.
    width = distribution.zeta - distribution.gamma
    fp32, low = torch.finfo(torch.float32).eps, torch.finfo(out_dtype).eps
    magnitude = truth.abs() + width * weight.double().abs() * fp32 / low
    assert_no_more_wrong(
        out.cpu(), gate(z, weight, out_dtype), truth, magnitude=magnitude, name="out"
    )
    assert_no_more_wrong(
        expected_open.cpu(),
        distribution.open_probability(log_alpha).sum(),
        p_true.sum(),
        name="expected_open",
    )
    assert bool((out.cpu()[z_true == 0] == 0).all())


@kernel_test
@pytest.mark.parametrize(("dtype", "out_dtype", "distribution"), KINDS)
@pytest.mark.parametrize("n", ALL_SIZES)
def test_backward_is_no_more_wrong_than_the_reference(
    n: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    distribution: HardConcrete,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from l0fast_kernels import gated_weight_backward, launch

    weight = torch.randn(n, device=DEVICE).to(dtype)
    log_alpha = 2 * torch.randn(n, device=DEVICE)
    dout = torch.randn(n, device=DEVICE).to(out_dtype)
    dopen = torch.tensor(-0.7, device=DEVICE)
    with guarded(launch, monkeypatch):
        dweight, dlog_alpha = gated_weight_backward(
            dout, dopen, weight, log_alpha, state(DEVICE), constants(distribution)
        )
    assert dweight.dtype == dtype
    assert_written(dweight, dlog_alpha)

    weight, log_alpha, dout, dopen = weight.cpu(), log_alpha.cpu(), dout.cpu(), dopen.cpu()
    z_true, slope, clear = gate_and_slope(log_alpha, distribution)
    _, p_slope = open_probability(log_alpha, distribution)
    s = distribution.concrete(log_alpha, noise(n, torch.float32, distribution))
    z = distribution.stretched(s)
    width = distribution.zeta - distribution.gamma
    fp32, low = torch.finfo(torch.float32).eps, torch.finfo(dtype).eps
    truth = dout.double() * z_true
    assert_no_more_wrong(
        dweight.cpu(),
        gate(z, dout, dtype),
        truth,
        magnitude=truth.abs() + width * dout.double().abs() * fp32 / low,
        name="dweight",
    )

    dz = dout.float() * weight.float()
    p = distribution.open_probability(log_alpha)
    expected = distribution.backward(dz, z, s, dopen.expand(n), p)
    assert expected is not None
    dz_true = dout.double() * weight.double()
    magnitude = dz_true.abs() * width / distribution.temperature + dopen.abs()
    assert int((~clear).sum()) <= 2 + n // 1000
    assert_no_more_wrong(
        dlog_alpha.cpu()[clear],
        expected[clear],
        (dz_true * slope + dopen.double() * p_slope)[clear],
        magnitude=magnitude[clear],
        name="dlog_alpha",
    )


@kernel_test
def test_a_closed_gate_stops_both_gradients_exactly() -> None:
    from l0fast_kernels import gated_weight_backward, gated_weight_forward

    n = 4096
    weight = 1 + torch.rand(n, device=DEVICE)
    log_alpha = 2 * torch.randn(n, device=DEVICE)
    out, _ = gated_weight_forward(weight, log_alpha, state(DEVICE), constants(), torch.float32)
    dweight, dlog_alpha = gated_weight_backward(
        weight, None, weight, log_alpha, state(DEVICE), constants()
    )
    closed, full = out == 0, out == weight
    assert int(closed.sum()) > 500
    assert int(full.sum()) > 500
    assert bool((dweight[closed] == 0).all())
    assert bool((dlog_alpha[closed | full] == 0).all())
    assert bool((dlog_alpha[~(closed | full)] > 0).all())


@kernel_test
def test_every_gate_equals_that_of_the_flat_draw() -> None:
    from l0fast_kernels import gated_weight_forward, hard_concrete_forward

    n = 5000
    log_alpha = 2 * torch.randn(n, device=DEVICE)
    z, expected_open = hard_concrete_forward(log_alpha, state(DEVICE), (n,), constants())
    assert expected_open is not None
    for dtype in (torch.float32, torch.float16):
        ones = torch.ones(50, 100, dtype=dtype, device=DEVICE)
        out, total = gated_weight_forward(
            ones, log_alpha.view(50, 100), state(DEVICE), constants(), torch.float32
        )
        assert out.shape == (50, 100)
        assert torch.equal(out.view(-1), z)
        torch.testing.assert_close(total, expected_open[0], rtol=1e-6, atol=0)


@kernel_test
def test_strided_input_counts_elements_not_addresses() -> None:
    from l0fast_kernels import gated_weight_backward, gated_weight_forward

    c, named = constants(), state(DEVICE)
    weight, log_alpha, dout = torch.randn(3, 40, 30, device=DEVICE).transpose(1, 2).unbind()
    copies = [tensor.contiguous() for tensor in (weight, log_alpha, dout)]
    assert not weight.is_contiguous()

    def everything(weight: Tensor, log_alpha: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        return (
            *gated_weight_forward(weight, log_alpha, named, c, torch.float32),
            *gated_weight_backward(dout, None, weight, log_alpha, named, c),
        )

    for got, expected in zip(everything(weight, log_alpha, dout), everything(*copies), strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, expected)


@kernel_test
def test_equal_input_gives_equal_bits() -> None:
    from l0fast_kernels import gated_weight_forward

    weight, log_alpha = torch.randn(2, 64, 257, device=DEVICE)
    runs = [
        gated_weight_forward(weight, log_alpha, state(DEVICE), constants(), torch.float32)
        for _ in range(2)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_more_elements_than_an_int32_counts() -> None:
    from l0fast_kernels import gated_weight_backward, gated_weight_forward

    n, tail = 2**31 + 4096, 8192
    weight = torch.ones(n, dtype=torch.float16, device="cuda")
    log_alpha = torch.zeros(n, device="cuda")
    named, c = state("cuda"), constants()
    out, expected_open = gated_weight_forward(weight, log_alpha, named, c, torch.float16)
    u = philox.uniform(tail, SEED, STEP, TENSOR, start=n - tail)
    z = DISTRIBUTION.gate(torch.zeros(tail), DISTRIBUTION.logistic_noise(u))
    torch.testing.assert_close(out[-tail:].float().cpu(), z, rtol=1e-3, atol=1e-6)
    p = float(DISTRIBUTION.open_probability(torch.zeros(())))
    assert abs(float(expected_open) / n - p) < 1e-5
    dweight, dlog_alpha = gated_weight_backward(weight, expected_open, weight, log_alpha, named, c)
    assert torch.equal(dweight, out)
    assert not bool(dlog_alpha[-tail:].isnan().any())
