"""What only a GPU can show of a training step; where a CPU has something to say, it says it too."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.parallel import DistributedDataParallel

from l0fast import DensityConstraint, param_groups, sparsify_
from l0fast.layers.handle import gates
from l0fast.training.cuda_graph import why_not
from tests.helpers.counting import CaptureSafe

pytestmark = pytest.mark.unpoisoned  # an op without a deterministic algorithm would refuse

GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
    )


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()).append(
        nn.Linear(16, 4)
    )


def step(model: Callable[[Tensor], Tensor], gated: nn.Module, x: Tensor) -> list[Tensor]:
    """The loss of one step, and the gradients that it leaves."""
    constraint = DensityConstraint(gated, 0.5)
    constraint.multiplier.fill_(0.1)
    torch.manual_seed(1)
    loss = model(x).float().square().mean() + constraint()
    loss.backward()
    constraint.step()
    return [loss.detach(), *(p.grad for p in gated.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("make", [perceptron, convolutions])
def test_a_step_compiles_whole(make: Callable[[], nn.Module], device: str, backend: str) -> None:
    shape = (4, 12) if make is perceptron else (4, 3, 8, 8)
    model = sparsify_(make()).to(device)
    twin, x = copy.deepcopy(model), torch.randn(shape, device=device)
    compiled: Any = torch.compile(twin, fullgraph=True, backend=backend)
    with inductor.patch(fallback_random=True):  # eager's draws
        got = step(compiled, twin, x)
    torch.testing.assert_close(got, step(model, model, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("kind", ["weight", "output", "input"])
def test_gates_do_not_depend_on_the_memory_format(kind: str, device: str) -> None:
    model = sparsify_(convolutions(), gates=kind).to(device)
    last: Any = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 8, 8, device=device)
    got = step(last, last, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, step(model, model, x), rtol=1e-3, atol=1e-4)
    if kind != "weight":  # whose gates are made in their own order
        assert last[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_a_graph_is_refused_where_convolutions_read_gates_back() -> None:
    x = torch.randn(4, 3, 8, 8, device="cuda")
    model = sparsify_(convolutions().cuda(), example_inputs=x, skip=True)
    skipping = gates(model).skipping
    assert skipping is not None
    assert not skipping.unread
    assert why_not(model, x.device) == "skip=True reads the gates of convolutions back to the host"
    assert all(bool(one.isfinite().all()) for one in step(model, model, x))


@pytest.mark.parametrize(("device", "tokens", "width"), [("cpu", 32, 64), ("cuda", 8192, 4096)])
def test_a_feed_forward_block_in_half_precision(device: str, tokens: int, width: int) -> None:
    """Skipped and masked, in bf16 under autocast: no further from float32 than bf16 is."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    block = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    x = torch.randn(tokens, width, device=device)
    skipped = sparsify_(block.to(device), example_inputs=x, density_init=0.5, skip=True)
    masked = copy.deepcopy(skipped)
    gates(masked).skipping = None
    with torch.autocast(device, torch.bfloat16):
        got = step(skipped, skipped, x)
        expected = step(masked, masked, x)
    truth = step(masked, masked.zero_grad() or masked, x)
    for one, other, true in zip(got, expected, truth, strict=True):
        size = float(true.norm())
        assert float((one - true).norm()) <= 2 * float((other - true).norm()) + 1e-3 * size


@contextmanager
def one_process(backend: str, store: Path) -> Generator[None]:
    dist.init_process_group(backend, f"file://{store}", world_size=1, rank=0)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpu)]
)
def test_one_process_of_ddp_takes_the_plain_step(device: str, backend: str, tmp_path: Path) -> None:
    model = sparsify_(perceptron()).to(device)
    twin, x = copy.deepcopy(model), torch.randn(4, 12, device=device)
    with one_process(backend, tmp_path / "store"):
        got = step(DistributedDataParallel(twin), twin, x)
    torch.testing.assert_close(got, step(model, model, x))


@contextmanager
def no_sync() -> Generator[None]:
    try:
        with warnings.catch_warnings():  # it is a prototype, it says
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("device", "watch"),
    [("cpu", CaptureSafe), pytest.param("cuda", no_sync, marks=pytest.mark.gpu)],
)
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("make", [perceptron, convolutions])
def test_a_step_never_waits_for_the_device(
    make: Callable[[], nn.Module],
    attached: bool,
    device: str,
    watch: Callable[[], AbstractContextManager[object]],
) -> None:
    shape = (4, 12) if make is perceptron else (4, 3, 8, 8)
    model, x = sparsify_(make(), skip=False).to(device), torch.randn(shape, device=device)
    groups = param_groups(model, lr=1e-3, steps=400)
    adam = torch.optim.AdamW(groups, fused=True, capturable=device == "cuda")
    constraint = DensityConstraint(model, 0.9, steps=400)
    if attached:
        constraint.attach(adam, start=0)

    def once() -> None:
        loss = model(x).square().mean()
        (loss if attached else loss + constraint()).backward()
        adam.step()
        adam.zero_grad()
        if not attached:
            constraint.step()

    once()
    with watch():
        once()
