"""What a step of one's own loop launches on a GPU, and that it can be captured there."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import counting
from l0fast import DensityConstraint, gates, param_groups, sparsify_
from l0fast.training.models import build
from tests.helpers.interpreter import kernel_test
from tests.helpers.launches import launches_as_on_a_gpu
from tests.helpers.thinned import thinned_product

pytestmark = [
    pytest.mark.unpoisoned,  # filling memory would be captured too
    pytest.mark.filterwarnings("ignore:attach. 40 steps are few", "ignore:settle. the expected"),
]

Make = Callable[[str], tuple[nn.Module, Tensor]]
STEPS, ORDINARY = 40, 3
WATCHED = 12
"""After so many steps a constraint looks no more whether its gates move."""
KINDS = ["explicit", "attached", "settled"]
MORE = {"perceptron": (16, 12, 14), "normed": (24, 20, 22)}
"""Launches of a step beside the dense one's, of each kind: a mask each way for each of three
layers, the draw's three, a copy of its gradients; the constraint's two and its sum with the loss;
the end of the step; a second group of Adam's, of two, or an attached constraint's one. And for each
of two batch norms its weight's and bias's masks each way, and twice a sum of gradients."""


class Loop:
    """Steps of a small model, dense or with a constraint in one of the ways there are."""

    def __init__(self, model: nn.Module, x: Tensor, kind: str) -> None:
        self.model, self.x = model, x
        self.y = torch.arange(len(x), device=x.device) % 3
        self.kind = kind
        self.term: DensityConstraint | None = None
        options: dict[str, Any] = {"fused": True, "capturable": x.is_cuda}
        if kind == "dense":
            self.adam = torch.optim.Adam(model.parameters(), 1e-3, **options)
            return
        sparsify_(model)
        self.adam = torch.optim.Adam(param_groups(model, 1e-3, steps=STEPS), **options)
        self.term = DensityConstraint(model, 0.5, steps=STEPS, start=0)
        if kind == "attached":
            self.term.attach(self.adam, start=0, settle=0.25)
        if kind == "settled":
            self.term.settle()

    def step(self) -> None:
        loss = F.cross_entropy(self.model(self.x), self.y)
        explicit = None if self.kind == "attached" else self.term
        if explicit is not None:
            loss = loss + explicit()
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        if explicit is not None:
            explicit.step()


def perceptron(device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    shape, hidden = ((1, 28, 28), (300, 100)) if device == "cuda" else ((1, 8, 8), (12, 10))
    return build("mlp", shape, 10, hidden).to(device), torch.randn(16, *shape, device=device)


def normed(device: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    parts = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)
    model = nn.Sequential(*parts, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 3))
    return model.to(device), torch.randn(8, 3, 8, 8, device=device)


def more_than_dense(
    make: Make, kind: str, device: str, launched: Callable[[Callable[[], None]], Counter[str]]
) -> Counter[str]:
    """What a step of a kind launches beside the dense one's."""
    found: list[Counter[str]] = []
    for one in ("dense", kind):
        loop = Loop(*make(device), one)
        for _ in range(WATCHED):
            loop.step()
        found.append(launched(loop.step))
    assert not found[0] - found[1]
    return found[1] - found[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [perceptron, normed])
def test_a_step_is_within_its_launches(make: Make, kind: str) -> None:
    more = more_than_dense(make, kind, "cuda", lambda step: Counter(counting.kernels(step)))
    assert more.total() <= MORE[make.__name__][KINDS.index(kind)], more


@kernel_test
@pytest.mark.parametrize(("make", "kind"), thinned_product(2, [perceptron, normed], KINDS))
def test_a_steps_operations_and_kernels_are_as_many(make: Make, kind: str) -> None:
    more = more_than_dense(make, kind, "cpu", launches_as_on_a_gpu)
    assert more.total() == MORE[make.__name__][KINDS.index(kind)], more


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["explicit", "attached"])
@pytest.mark.parametrize("make", [perceptron, normed])
def test_a_step_of_ones_own_is_captured(make: Make, kind: str) -> None:
    """A training whose steps are replays is the ordinary one; it is captured anew where gates
    settle."""
    model, x = make("cuda")
    plain, graphed = Loop(copy.deepcopy(model), x, kind), Loop(model, x, kind)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    captures = 0
    with torch.cuda.stream(stream):
        torch.manual_seed(1)
        for _ in range(STEPS):
            plain.step()
        torch.manual_seed(1)
        graph, ordinary = None, 0
        assert graphed.term is not None
        for _ in range(STEPS):
            if ordinary < ORDINARY:
                graphed.step()
                ordinary += 1
                continue
            if graph is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    graphed.step()
                captures += 1
            graph.replay()
            if graphed.term.count_():
                graph, ordinary = None, 0
    stream.synchronize()
    assert captures == (2 if kind == "attached" else 1)
    assert gates(graphed.model).settled == (kind == "attached")
    pairs = zip(graphed.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    for one, other in pairs:
        assert torch.equal(one, other)
    for one, other in zip(graphed.term.buffers(), plain.term.buffers(), strict=True):  # type: ignore[union-attr]
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_skipped_convolutions_are_what_they_are_masked(device: str) -> None:
    model, x = normed(device)
    skipped = sparsify_(model, example_inputs=x, density_init=0.5, skip=True)
    masked = copy.deepcopy(skipped)
    gates(masked).skipping = None
    found: list[list[Tensor]] = []
    for one in (skipped, masked):
        torch.manual_seed(1)
        loss = one(x).square().mean()
        loss.backward()
        grads = [p.grad for p in one.parameters() if p.grad is not None]
        found.append([loss.detach(), *grads])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["dense", *MORE])
@pytest.mark.parametrize("make", [perceptron, normed])
def test_every_loop_trains(make: Make, kind: str) -> None:
    """What the tests above count and capture, on a CPU."""
    loop = Loop(*make("cpu"), kind)
    before = [parameter.detach().clone() for parameter in loop.model.parameters()]
    loop.step()
    after = list(loop.model.parameters())
    assert any(not torch.equal(one, other) for one, other in zip(before, after, strict=True))
    if kind != "settled" and loop.term is not None:
        assert any(one.numel() for one in gates(loop.model).parameters())
        assert float(loop.term.taken) == 1
