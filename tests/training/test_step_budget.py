"""What a training step dispatches beside the dense one's: held to a budget, with no read by the
host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import DensityConstraint, param_groups, sparsify_
from tests.helpers.counting import CaptureSafe, Counting

pytestmark = pytest.mark.usefixtures("one_thread")

Step = Callable[[], None]
FIXED = 30
"""Operations of a step whatever the model: the draw, the constraint, a second group of Adam's."""
LAYER = 5
"""The same for each gated layer: its mask, the two gradients, and log_alpha's bounds."""
SETTLED = 26, 4
"""Both with the gates settled, when nothing is drawn and no multiplier moves."""


class Block(nn.Module):
    """Two convolutions with batch norms, and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


def mlp(depth: int) -> tuple[nn.Module, Tensor]:
    hidden = [part for _ in range(depth - 1) for part in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(8, 3)), torch.randn(4, 8)


def resnet(blocks: int) -> tuple[nn.Module, Tensor]:
    stages = [Block(4) for _ in range(blocks)]
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(nn.Conv2d(3, 4, 3), *stages, *pooled), torch.randn(2, 3, 6, 6)


def ordinary(model: nn.Module, x: Tensor) -> Step:
    adam = torch.optim.Adam(model.parameters(), fused=True)

    def step() -> None:
        F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
        adam.step()
        adam.zero_grad()

    return step


def gated(model: nn.Module, x: Tensor, settled: bool, device: str = "cpu") -> Step:
    sparsify_(model, skip=False, example_inputs=x)
    constraint = DensityConstraint(model, 0.95)
    if settled:
        constraint.settle()
    x, model = x.to(device), model.to(device)
    target = torch.zeros(len(x), dtype=torch.long, device=device)
    groups = param_groups(model, lr=1e-3)
    sgd = device == "meta"  # for which there is no fused Adam
    optimizer = torch.optim.SGD(groups) if sgd else torch.optim.Adam(groups, fused=True)

    def step() -> None:
        (F.cross_entropy(model(x), target) + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()

    return step


def work(step: Step) -> Counter[str]:
    """What a step dispatches that computes, once what is made in the first is there."""
    step()
    step()
    with Counting() as counting:
        step()
    return counting.work


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Tensor]], int]] = {
    "MLP of 3 layers": (lambda: mlp(3), 3),
    "MLP of 12 layers": (lambda: mlp(12), 12),
    "ResNet of 6 layers": (lambda: resnet(2), 6),
    "ResNet of 14 layers": (lambda: resnet(6), 14),
}


@pytest.mark.parametrize("settled", [False, True], ids=["drawn", "settled"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_within_its_budget(name: str, settled: bool) -> None:
    make, layers = MODELS[name]
    torch.manual_seed(0)
    dense, ours = work(ordinary(*make())), work(gated(*make(), settled))
    more = ours.total() - dense.total()
    fixed, each = SETTLED if settled else (FIXED, LAYER)
    assert more <= fixed + each * layers, dict(ours - dense)


@pytest.mark.parametrize("settled", [False, True], ids=["drawn", "settled"])
@pytest.mark.parametrize("name", ["MLP of 3 layers", "ResNet of 6 layers"])
def test_the_host_reads_nothing(name: str, settled: bool) -> None:
    step = gated(*MODELS[name][0](), settled, "meta")  # nor is a tensor there copied to the host
    step()
    with CaptureSafe():
        step()


def test_a_read_by_the_host_is_seen() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), CaptureSafe():
        float(torch.ones(()).sum())
