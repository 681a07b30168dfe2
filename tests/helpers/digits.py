"""The same small training for every trainer: digits in one order, gates drawn alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from l0fast import DensityConstraint, gates, prune, sparsify_

STEPS, BATCH, TARGET = 200, 64, 0.25


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and classes to train on, in the order of the batches, and to test on."""
    found: Any = load_digits()
    x, y = torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    rows = order[:1400][
        torch.randint(1400, (STEPS * BATCH,), generator=torch.Generator().manual_seed(1))
    ]
    return x[rows], y[rows], x[order[1400:]], y[order[1400:]]


class Net(nn.Module):
    """An MLP as Hugging Face's Trainer calls it: by keyword, with the loss in its output."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.body(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Seeded(nn.Module):
    """Seeds the noise of each training forward by its number, so that all trainers draw alike."""

    def __init__(self, net: nn.Module, parts: int = 1) -> None:
        super().__init__()
        self.net, self.parts, self.count = net, parts, 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            torch.manual_seed(self.count // self.parts)
            self.count += 1
        return self.net(x=x, labels=labels)


def prepared() -> nn.Module:
    """With gates."""
    torch.manual_seed(0)
    return sparsify_(Net(), example_inputs={"x": torch.zeros(2, 64)})


def plain() -> tuple[nn.Module, DensityConstraint]:
    """The plain loop, whose training the others shall take."""
    x, y, _, _ = digits()
    net = prepared()
    model = Seeded(net)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0)
    constraint = constrained(net).attach(optimizer)
    for step in range(STEPS):
        rows = slice(step * BATCH, (step + 1) * BATCH)
        model(x[rows], y[rows])["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, constraint


def constrained(net: nn.Module) -> DensityConstraint:
    """A quarter of the parameters."""
    example = {"x": torch.zeros(2, 64)}
    return DensityConstraint(net, TARGET, measure="params", example_inputs=example, steps=STEPS)


def assert_within(net: nn.Module) -> float:
    """The pruned model is as small as was asked for; its accuracy."""
    *_, x, y = digits()
    assert gates(net).settled
    small: Any = prune(net, {"x": torch.zeros(2, 64)})
    after, before = small.report.params
    assert after <= TARGET * before
    with torch.no_grad():
        accuracy = float((small.eval()(x)["logits"].argmax(1) == y).double().mean())
    assert accuracy > 0.88
    return accuracy


def assert_same_training(net: nn.Module, other: nn.Module, tolerance: float = 1e-3) -> None:
    """Gates and weights agree within rounding."""
    for (name, one), two in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, msg=name)
