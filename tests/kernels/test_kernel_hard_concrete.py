"""The kernels of l0fast_kernels.hard_concrete, against float64 truth and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from l0fast.maths import philox
from l0fast.maths.hard_concrete import HardConcrete
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.thinned import thinned_product
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import (
    DISTRIBUTION,
    EDGE,
    OTHER,
    SEED,
    SIZES,
    STEP,
    TENSOR,
    assert_written,
    constants,
    gate_and_slope,
    guarded,
    noise,
    open_probability,
    state,
)

SEGMENTS = [(n,) for n in SIZES] + [(300, 0, 100, 784), (1, 2, 3), (16, 1040, 2048), (5, 16390)]


def log_alphas(n: int) -> Tensor:
    return 2 * torch.randn(n, device=DEVICE)


def forward(
    log_alpha: Tensor, sizes: tuple[int, ...], distribution: HardConcrete = DISTRIBUTION
) -> tuple[Tensor, Tensor]:
    from l0fast_kernels import hard_concrete_forward

    c = constants(distribution)
    z, expected_open = hard_concrete_forward(log_alpha, state(DEVICE), sizes, c)
    assert expected_open is not None
    return z, expected_open


def backward(
    dz: Tensor | None,
    dopen: Tensor | None,
    log_alpha: Tensor,
    sizes: tuple[int, ...],
    distribution: HardConcrete = DISTRIBUTION,
) -> Tensor:
    from l0fast_kernels import hard_concrete_backward

    c = constants(distribution)
    return hard_concrete_backward(dz, dopen, log_alpha, state(DEVICE), sizes, c)


def sums(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return torch.stack([part.sum() for part in values.split(list(sizes))])


def spread(dopen: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return dopen.repeat_interleave(torch.tensor(sizes, device=dopen.device))


@kernel_test
@pytest.mark.parametrize("vector", [4, 8])
@pytest.mark.parametrize("first", [0, 3 * 1024, 2**31, 2**34 - 1024, 2**34, 2**40])
def test_noise_equals_the_reference_bit_for_bit(vector: int, first: int) -> None:
    from l0fast_kernels import launch
    from tests.kernels.probe_kernels import noise_kernel

    size = 1024
    words, theirs = torch.empty(2, size, dtype=torch.int64, device=DEVICE)
    uniform = torch.empty(size, device=DEVICE)

    def draw(named: Tensor) -> None:
        options: dict[str, Any] = {"SIZE": size, "VECTOR": vector, "FAST": launch.fast()}
        noise_kernel[(1,)](named, words, theirs, uniform, first, **options)

    draw(state(DEVICE))
    expected = philox.words(size, SEED, STEP, TENSOR, start=first)
    assert words.tolist() == expected.tolist()
    assert uniform.tolist() == philox.uniform_from_words(expected).tolist()

    draw(torch.tensor([SEED, 0, 0], device=DEVICE))
    assert words.tolist() == philox.words(size, SEED, start=first).tolist()
    assert words.tolist() == theirs.tolist()


@kernel_test
@pytest.mark.parametrize("distribution", [DISTRIBUTION, OTHER])
@pytest.mark.parametrize("sizes", SEGMENTS, ids=str)
def test_forward_is_no_more_wrong_than_the_reference(
    sizes: tuple[int, ...], distribution: HardConcrete, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import launch

    n = sum(sizes)
    log_alpha = log_alphas(n)
    with guarded(launch, monkeypatch):
        z, expected_open = forward(log_alpha, sizes, distribution)
    assert_written(z, expected_open)

    on_cpu = log_alpha.cpu()
    z_true, _, _ = gate_and_slope(log_alpha, distribution)
    p_true, _ = open_probability(log_alpha, distribution)
    reference = distribution.gate(on_cpu, noise(n, torch.float32, distribution))
    # The terms of z = s * width + gamma are as large as the width.
    width = distribution.zeta - distribution.gamma
    assert_no_more_wrong(z.cpu(), reference, z_true, magnitude=width, name="z")
    assert_no_more_wrong(
        expected_open.cpu(),
        sums(distribution.open_probability(on_cpu), sizes),
        sums(p_true, sizes),
        name="expected_open",
    )


@kernel_test
@pytest.mark.parametrize("distribution", [DISTRIBUTION, OTHER])
@pytest.mark.parametrize(
    ("given", "sizes"), thinned_product(2, ["both", "dz", "dopen"], SEGMENTS), ids=str
)
def test_backward_is_no_more_wrong_than_the_reference(
    sizes: tuple[int, ...],
    given: str,
    distribution: HardConcrete,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from l0fast_kernels import launch

    n = sum(sizes)
    log_alpha = log_alphas(n)
    dz = torch.randn(n, device=DEVICE)
    dopen = torch.randn(len(sizes), device=DEVICE)
    with guarded(launch, monkeypatch):
        dlog_alpha = backward(
            dz if given != "dopen" else None,
            dopen if given != "dz" else None,
            log_alpha,
            sizes,
            distribution,
        )
    assert_written(dlog_alpha)

    dz = dz.cpu() if given != "dopen" else torch.zeros(n)
    each = spread(dopen.cpu(), sizes) if given != "dz" else torch.zeros(n)
    _, slope, clear = gate_and_slope(log_alpha, distribution)
    _, p_slope = open_probability(log_alpha, distribution)
    truth = dz.double() * slope + each.double() * p_slope

    on_cpu = log_alpha.cpu()
    s = distribution.concrete(on_cpu, noise(n, torch.float32, distribution))
    p = distribution.open_probability(on_cpu)
    reference = distribution.backward(dz, distribution.stretched(s), s, each, p)
    assert reference is not None
    # s (1 - s) is a difference of terms up to 1, times the width over the temperature.
    steepness = (distribution.zeta - distribution.gamma) / distribution.temperature
    magnitude = dz.abs() * steepness + each.abs()
    assert int((~clear).sum()) <= 2 + n // 1000
    assert_no_more_wrong(
        dlog_alpha.cpu()[clear],
        reference[clear],
        truth[clear],
        magnitude=magnitude[clear],
        name="dlog_alpha",
    )


@kernel_test
def test_a_clamped_gate_has_no_gradient_from_the_data() -> None:
    n = 4097
    log_alpha = log_alphas(n)
    z, _ = forward(log_alpha, (n,))
    dlog_alpha = backward(torch.ones(n, device=DEVICE), None, log_alpha, (n,))
    clamped = (z == 0) | (z == 1)
    assert int((z == 0).sum()) > 500
    assert int((z == 1).sum()) > 500
    assert bool((dlog_alpha[clamped] == 0).all())
    assert bool((dlog_alpha[~clamped] > 0).all())


@kernel_test
# NumPy, which the interpreter computes with, mentions the infinities this test is about.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_extreme_log_alpha_is_finite_and_nan_is_loud() -> None:
    extremes = [-torch.inf, -3e38, -1e4, -88.0, 88.0, 1e4, 3e38, torch.inf]
    log_alpha = torch.tensor(extremes, device=DEVICE)
    z, expected_open = forward(log_alpha, (len(extremes),))
    assert z.tolist() == [0.0] * 4 + [1.0] * 4
    assert expected_open.tolist() == [4.0]
    gradient = backward(torch.ones_like(z), expected_open, log_alpha, (len(extremes),))
    assert float(gradient.abs().max()) < 1e-30

    log_alpha[3] = torch.nan
    _, expected_open = forward(log_alpha, (len(extremes),))
    assert bool(expected_open.isnan().all())
    gradient = backward(None, torch.ones_like(expected_open), log_alpha, (len(extremes),))
    assert gradient.isnan().tolist() == [i == 3 for i in range(len(extremes))]


@kernel_test
def test_strided_input_counts_elements_not_addresses() -> None:
    n, sizes = 1023, (1000, 23)
    apart = log_alphas(2 * n)[::2]
    together = apart.contiguous()
    dz, dopen = torch.randn(n, 2, device=DEVICE)[:, 0], torch.randn(4, device=DEVICE)[::2]
    for got, expected in zip(forward(apart, sizes), forward(together, sizes), strict=True):
        assert torch.equal(got, expected)
    got = backward(dz, dopen, apart, sizes)
    expected = backward(dz.contiguous(), dopen.contiguous(), together, sizes)
    assert torch.equal(got, expected)


@kernel_test
def test_the_state_is_read_from_memory_at_each_launch() -> None:
    from l0fast_kernels import hard_concrete_forward

    n, c, named = 256, constants(), state(DEVICE)
    log_alpha = log_alphas(n)
    first = hard_concrete_forward(log_alpha, named, (n,), c)[0]
    named[1] += 1
    second = hard_concrete_forward(log_alpha, named, (n,), c)[0]
    named[1] -= 1
    third = hard_concrete_forward(log_alpha, named, (n,), c)[0]
    assert not torch.equal(first, second)
    assert torch.equal(first, third)


@kernel_test
def test_no_segments_at_all() -> None:
    nothing = torch.empty(0, device=DEVICE)
    z, expected_open = forward(nothing, ())
    assert z.shape == (0,)
    assert expected_open.shape == (0,)
    assert backward(nothing, expected_open, nothing, ()).shape == (0,)


@kernel_test
@pytest.mark.parametrize(
    "sizes",
    [(300, 0, 100, 784), (1, 2, 3), pytest.param((5, 16390), marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_layers_apart_are_drawn_as_end_to_end(
    sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import hard_concrete_backward, hard_concrete_forward, launch

    c, n = constants(), sum(sizes)
    together = log_alphas(n)
    apart = [part.clone() for part in together.split(list(sizes))]
    dz, dopen = torch.randn(n, device=DEVICE), torch.randn(len(sizes), device=DEVICE)
    named = state(DEVICE)
    with guarded(launch, monkeypatch):
        got = hard_concrete_forward(apart, named, sizes, c)
        gradient = hard_concrete_backward(dz, dopen, apart, named, sizes, c)
    assert got[1] is not None
    assert_written(got[0], got[1], gradient)
    expected = forward(together, sizes)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    of_flat = hard_concrete_backward(dz, dopen, together, named, sizes, c)
    assert torch.equal(gradient, of_flat)


@kernel_test
@pytest.mark.parametrize("distribution", [DISTRIBUTION, OTHER])
def test_without_noise_gates_are_their_medians(
    distribution: HardConcrete, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import hard_concrete_backward, hard_concrete_forward, launch

    c, sizes = constants(distribution), (4097, 3)
    log_alpha = log_alphas(sum(sizes))
    log_alpha[:2] = torch.tensor([-torch.inf, -9.0])
    dz = torch.randn_like(log_alpha)
    with guarded(launch, monkeypatch):
        z, counted = hard_concrete_forward(log_alpha, None, sizes, c)
        got = hard_concrete_backward(dz, None, log_alpha, None, sizes, c)
    assert counted is None
    assert_written(z, got)
    assert z[:2].tolist() == [0.0, 0.0]
    results: list[list[Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        leaf = log_alpha.cpu().to(dtype).requires_grad_()
        median = distribution.median(leaf)
        results.append([median.detach(), *torch.autograd.grad(median, leaf, dz.cpu().to(dtype))])
    width = distribution.zeta - distribution.gamma
    magnitude = dz.abs().cpu() * width / distribution.temperature
    truth = results[1][0]
    clear = ((truth > EDGE) & (truth < 1 - EDGE)) | (truth == 0) | (truth == 1)
    assert_no_more_wrong(z.cpu(), results[0][0], truth, magnitude=width, name="z")
    assert_no_more_wrong(
        got.cpu()[clear],
        results[0][1][clear],
        results[1][1][clear],
        magnitude=magnitude[clear],
        name="dlog_alpha",
    )


@pytest.mark.gpu
def test_a_replayed_graph_draws_fresh_gates() -> None:
    from l0fast_kernels import hard_concrete_forward

    sizes, c = (300, 100), constants()
    log_alpha = log_alphas(400)
    named = state("cuda")
    hard_concrete_forward(log_alpha, named, sizes, c)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z, _ = hard_concrete_forward(log_alpha, named, sizes, c)
    graph.replay()
    first = z.clone()
    named[1] += 1
    graph.replay()
    assert not torch.equal(first, z)
    assert torch.equal(z, hard_concrete_forward(log_alpha, named, sizes, c)[0])
