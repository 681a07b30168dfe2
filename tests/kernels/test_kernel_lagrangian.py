"""The kernels of l0fast_kernels.lagrangian, against float64 truth and the reference."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn

from l0fast import DensityConstraint, sparsify_
from l0fast.maths import lagrangian as maths
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import assert_written, guarded

SIZES = [(1, 1), (1, 3), (1, 5000), (3, 54), (17, 130), (300, 40)]


@kernel_test
@pytest.mark.parametrize("taken", [None, 0, 3, 12])
@pytest.mark.parametrize(("constraints", "layers"), SIZES)
def test_the_term_is_no_more_wrong_than_the_reference(
    constraints: int, layers: int, taken: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from l0fast_kernels import lagrangian_backward, lagrangian_forward, launch

    counts, weights = torch.rand(layers), torch.rand(constraints, layers)
    multiplier, target, start = torch.rand(3, constraints)
    dterm = torch.tensor(-1.5)

    def falling(like: torch.Tensor) -> maths.Falling | None:
        if taken is None:
            return None
        return maths.Falling(start.to(like), torch.tensor(float(taken)).to(like), 11, 3)

    given = counts, weights, multiplier, target
    a, b, c, d = (one.to(DEVICE) for one in given)
    with guarded(launch, monkeypatch):
        term, violation = lagrangian_forward(a, b, c, d, falling(d))
        dcounts = lagrangian_backward(dterm.to(DEVICE), b, c)
    assert_written(term, violation, dcounts)
    expected = maths.lagrangian(*given, falling(target))
    given = counts.double(), weights.double(), multiplier.double(), target.double()
    true = maths.lagrangian(*given, falling(given[3]))
    size = given[1] @ given[0] + given[3] + start.double()
    for got, reference, truth, magnitude, name in (
        (violation, expected[1], true[1], size, "violation"),
        (term, expected[0], true[0], given[2] @ size, "term"),
    ):
        assert_no_more_wrong(got.cpu(), reference, truth, magnitude=magnitude, name=name)
    truth = maths.lagrangian_backward(dterm.double(), given[1], given[2])
    reference = maths.lagrangian_backward(dterm, weights, multiplier)
    roundings = 4 + constraints / 16  # the interpreter adds up a tile's rows one after the other
    assert_no_more_wrong(
        dcounts.cpu(), reference, truth, magnitude=truth.abs(), roundings=roundings, name="dcounts"
    )


@kernel_test
@pytest.mark.parametrize("limit", [math.inf, 0.7])
@pytest.mark.parametrize("constraints", [1, 5, 300])
def test_an_ascent_is_the_references(constraints: int, limit: float) -> None:
    from l0fast_kernels import ascend_

    multiplier = torch.randn(constraints).clamp_(0.0, 0.7)
    violation = torch.randn(constraints)
    violation[::4] = 0
    if constraints > 1:
        multiplier[0] = math.nan
    given = multiplier, violation, torch.ones(constraints), torch.tensor(0.5)
    got = [one.clone().to(DEVICE) for one in given]
    ascend_(got[0], got[1], got[2], got[3], limit)
    maths.ascend_(given[0], given[1], given[2], given[3], limit)
    # One rounding less: the kernel's product and sum are fused.
    torch.testing.assert_close(got[0].cpu(), given[0], equal_nan=True)
    assert torch.equal(got[2].cpu(), given[2])


@kernel_test
def test_a_constraint_uses_the_kernels_and_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward, gradient and step, on the GPU or with the kernels put in the way of the CPU's."""
    import l0fast_kernels

    calls: list[str] = []

    def spy(name: str) -> None:
        run = getattr(l0fast_kernels, name)
        monkeypatch.setattr(
            l0fast_kernels, name, lambda *given: (calls.append(name), run(*given))[1]
        )

    names = ["lagrangian_forward", "lagrangian_backward", "advance_"]
    for name in names:
        spy(name)
    found: list[list[Any]] = []
    for with_kernels in (False, True):
        for room in ("lagrangian", "apart"):
            module: Any = importlib.import_module(f"l0fast.autograd.{room}")
            monkeypatch.setattr(module, "runs_on_triton", lambda *_, on=with_kernels: on)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(DEVICE)
        sparsify_(model)
        constraint = DensityConstraint(model, {"0": 0.95, "2": 0.3}).to(DEVICE)
        constraint.multiplier.copy_(torch.tensor([0.5, 0.25]))
        model(torch.randn(3, 6, device=DEVICE))
        term = constraint()
        term.backward()
        constraint.step()
        state = constraint.multiplier, constraint.violation, constraint.restarts
        grads = [p.grad for n, p in model.named_parameters() if n.endswith("log_alpha")]
        found.append([term.detach(), *state, *grads])
        assert calls == names * with_kernels
        term = constraint()
        constraint.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            term.backward()
        calls.clear()
    torch.testing.assert_close(found[1], found[0])
