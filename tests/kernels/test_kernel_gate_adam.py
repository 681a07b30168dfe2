"""The kernel of l0fast_kernels.gate_adam, against PyTorch's Adam in float64 and in float32."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, autograd, param_groups, sparsify_
from l0fast.maths.lagrangian import Falling, lagrangian
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.thinned import thinned_product
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import DISTRIBUTION, constants

NUMBERS = 0.05, 0.9, 0.999, 1e-8
STEPS = 3
SIZES = [(7,), (300, 100, 784), (5, 16390)]


Found = tuple[list[Tensor], list[Tensor], Tensor | None]


def truth(dtype: torch.dtype, given: dict[str, Any], pulled: bool) -> Found:
    """The gates, their second moments and the last violation after PyTorch's Adam."""
    gates = [one.to(dtype, copy=True).requires_grad_() for one in given["gates"]]
    lr, beta_1, beta_2, eps = NUMBERS
    adam = torch.optim.Adam(gates, lr=lr, betas=(beta_1, beta_2), eps=eps)
    violation = None
    for step in range(STEPS):
        grads = [torch.zeros_like(gate) for gate in gates]
        if given["grads"] is not None:
            parts = given["grads"][step].to(dtype).split([gate.numel() for gate in gates])
            grads = [part / given["scale"].to(dtype) for part in parts]
        if pulled:
            counts = torch.stack([DISTRIBUTION.open_probability(gate).sum() for gate in gates])
            start = given["start"].to(dtype)
            falling = Falling(start, torch.tensor(float(step), dtype=dtype), 5, 3)
            weights, multiplier = given["weights"].to(dtype), given["multiplier"].to(dtype)
            target = given["target"].to(dtype)
            term, violation = lagrangian(counts, weights, multiplier, target, falling)
            pulls = torch.autograd.grad(term, gates)
            grads = [one + other for one, other in zip(grads, pulls, strict=True)]
        for gate, grad in zip(gates, grads, strict=True):
            gate.grad = grad.detach()
        adam.step()
    second = [adam.state[gate]["exp_avg_sq"] for gate in gates]
    return [gate.detach() for gate in gates], second, violation


def of_kernel(given: dict[str, Any], pulled: bool) -> Found:
    from l0fast_kernels import gate_adam_

    gates = [one.clone().to(DEVICE) for one in given["gates"]]
    moments = (
        [torch.zeros_like(gate) for gate in gates],
        [torch.zeros_like(gate) for gate in gates],
        [torch.zeros((), device=DEVICE) for _ in gates],
    )
    violation = None
    shift = constants().open_shift
    for step in range(STEPS):
        pull: Any = None
        if pulled:
            counts = torch.stack([DISTRIBUTION.open_probability(gate).sum() for gate in gates])
            rest = [given[name].to(DEVICE) for name in ("weights", "multiplier", "target")]
            taken = torch.tensor(float(step), device=DEVICE)
            pull = counts, *rest, (given["start"].to(DEVICE), taken, 5, 3)
        grad, scale = None, None
        if given["grads"] is not None:
            grad, scale = given["grads"][step].to(DEVICE), given["scale"].to(DEVICE)
        violation = gate_adam_(gates, moments, grad, scale, NUMBERS, shift, pull)
    assert [float(one) for one in moments[2]] == [STEPS] * len(gates)
    on_cpu = [[one.cpu() for one in some] for some in (gates, moments[1])]
    return on_cpu[0], on_cpu[1], None if violation is None else violation.cpu()


@kernel_test
@pytest.mark.parametrize(
    ("sizes", "parts"), thinned_product(3, SIZES, ["both", "grad", "pull"]), ids=str
)
def test_steps_are_no_more_wrong_than_those_of_pytorch(sizes: tuple[int, ...], parts: str) -> None:
    layers, n = len(sizes), sum(sizes)
    given: dict[str, Any] = {
        "gates": [2 * torch.randn(size) for size in sizes],
        "grads": torch.randn(STEPS, n) * 64 if parts != "pull" else None,
        "scale": torch.tensor(64.0),
        "weights": torch.rand(2, layers) / n,
        "multiplier": torch.tensor([30.0, 2.0]) * n,
        "target": torch.tensor([0.2, 0.9]),
        "start": torch.tensor([0.8, 0.1]),
    }
    pulled = parts != "grad"
    got, reference = of_kernel(given, pulled), truth(torch.float32, given, pulled)
    true = truth(torch.float64, given, pulled)
    for place, name in enumerate(("log_alpha", "exp_avg_sq")):
        some: Any = got[place], reference[place], true[place]
        for one, other, exact in zip(*some, strict=True):
            # Two gradients may cancel: what is left has their roundings. Adam makes large steps of
            # small ones.
            size = exact.abs() + (1.0 if name == "log_alpha" else exact.max())
            assert_no_more_wrong(one, other, exact, magnitude=size, roundings=60, name=name)
    if not pulled:
        assert got[2] is None
        return
    ends = [one[2].detach() for one in (got, reference, true) if one[2] is not None]
    assert len(ends) == 3
    assert_no_more_wrong(*ends, magnitude=1 + ends[2].abs(), name="violation")


@kernel_test
@pytest.mark.parametrize("fall", [0.1, 0.001])
def test_bias_corrections_are_exact_early_and_late(fall: float) -> None:
    """One step of a constant gradient moves by the learning rate, whatever its number is."""
    from l0fast_kernels import gate_adam_

    for taken in (0, 1, 9, 10_000):
        gate = torch.zeros(3, device=DEVICE)
        second = 1 - (1 - fall) ** taken  # of gradients of 1
        first = 1 - 0.9**taken
        moments = (
            [torch.full_like(gate, first)],
            [torch.full_like(gate, second)],
            [torch.tensor(float(taken), device=DEVICE)],
        )
        gate_adam_(
            [gate], moments, torch.ones_like(gate), None, (0.05, 0.9, 1 - fall, 1e-12), 0.0, None
        )
        torch.testing.assert_close(gate.cpu(), torch.full((3,), -0.05), rtol=3e-6, atol=0.0)


@kernel_test
@pytest.mark.filterwarnings(
    "ignore:settle. the expected density", "ignore:attach. 20 steps are few"
)
def test_an_attached_training_uses_the_kernels_and_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drawn, under targets that come down, and settled; the draws are the reference's in both."""
    import l0fast_kernels

    calls: list[str] = []
    for name in ("gate_adam_", "advance_"):
        run = getattr(l0fast_kernels, name)
        monkeypatch.setattr(
            l0fast_kernels,
            name,
            lambda *given, name=name, run=run: (calls.append(name), run(*given))[1],
        )
    monkeypatch.setattr(autograd, "lie_apart", lambda tensors: False)
    found: list[list[Tensor]] = []
    for with_kernels in (False, True):
        for room in ("lagrangian", "apart"):
            module: Any = importlib.import_module(f"l0fast.autograd.{room}")
            monkeypatch.setattr(module, "runs_on_triton", lambda *_, on=with_kernels: on)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(DEVICE)
        sparsify_(model)
        sgd = torch.optim.SGD(param_groups(model, lr=1e-2))
        constraint = DensityConstraint(model, 0.6, steps=20)
        constraint.attach(sgd, start=0, settle=0.25)
        for _ in range(20):
            model(torch.randn(3, 6, device=DEVICE)).square().sum().backward()
            sgd.step()
            sgd.zero_grad()
        state: Any = sgd.state_dict()["l0fast"]
        moments = [one[name] for one in state["gates"].values() for name in sorted(one)]
        found.append([*model.state_dict().values(), *constraint.buffers(), *moments])
        assert constraint.settled
        assert calls == ["gate_adam_", "advance_"] * (20 * with_kernels)
    torch.testing.assert_close(found[1], found[0], rtol=2e-4, atol=2e-5)
