"""A layer's weight masked by one op, where kernels run; here the op computes with the reference."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import density, sparsify_
from l0fast.autograd import backend
from l0fast.autograd.ops import triton_scaled_weight
from l0fast.maths.gated_weight import mask
from tests.helpers.counting import Counting

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def leaves(layout: torch.memory_format, dim: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=layout).requires_grad_()
    return weight, torch.rand(weight.shape[dim]).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1])
def test_the_op_is_the_mask_and_keeps_the_memory_format(
    layout: torch.memory_format, dim: int
) -> None:
    weight, z = leaves(layout, dim)
    got, expected = triton_scaled_weight(weight, z, dim), mask(weight, z, dim)
    assert torch.equal(got, expected)
    assert got.stride() == weight.stride()
    dout = torch.randn(weight.shape)
    gradients = torch.autograd.grad(got, (weight, z), dout)
    wanted = torch.autograd.grad(expected, (weight, z), dout)
    torch.testing.assert_close(gradients, wanted)
    assert gradients[0].stride() == weight.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiler_is_told_the_same_strides(layout: torch.memory_format) -> None:
    weight, z = leaves(layout, 0)
    op: Any = torch.ops.l0fast.scaled_weight.default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (weight, z, 0, torch.bfloat16), test_utils=tests)


def convolutions(gates: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(64, 30),
        nn.ReLU(),
        nn.Linear(30, 5),
    )
    return sparsify_(model, gates=gates).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.parametrize("gates", ["output", "input"])
def test_a_step_with_the_op_is_the_step(gates: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled: Any = importlib.import_module("l0fast.autograd.scaled_weight")
    runs: list[list[Tensor]] = []
    counts: list[Counting] = []
    for op in (False, True):
        monkeypatch.setattr(scaled, "masks_on_triton", lambda weight, z, op=op: op)
        model, x = convolutions(gates), torch.ones(2, 3, 6, 6)
        torch.manual_seed(1)
        with Counting() as counting:
            loss = model(x).square().mean()
            loss.backward()
        counts.append(counting)
        runs.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)
    masked = counts[1].calls["scaled_weight"]
    assert masked == counts[1].calls["scaled_weight_backward"] >= 2
    assert counts[0].calls["scaled_weight"] == 0


def test_the_op_is_for_training_with_float32_gates() -> None:
    z = torch.rand(6, requires_grad=True)
    weight = torch.randn(6, 4)
    assert not backend.masks_on_triton(weight, z)  # no GPU here
    model = convolutions("output").eval()
    with Counting() as counting:
        model(torch.randn(2, 3, 6, 6))
    assert counting.calls["scaled_weight"] == 0
    assert density(model).total.expected > 0


@pytest.mark.gpu
@pytest.mark.parametrize("gates", ["output", "input"])
def test_layers_on_the_chip_use_the_kernel(gates: str) -> None:
    model, x = convolutions(gates).cuda(), torch.randn(2, 3, 6, 6, device="cuda")
    with Counting() as counting, torch.autocast("cuda", torch.bfloat16):
        model(x.to(memory_format=torch.channels_last)).float().square().mean().backward()
    assert counting.calls["scaled_weight"] > 2
    assert counting.calls["scaled_weight"] == counting.calls["scaled_weight_backward"]
