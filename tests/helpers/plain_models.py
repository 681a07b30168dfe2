"""Small models of several tests, as users write them.

They are of plain PyTorch, and importable where l0fast is not installed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with ReLUs between: "0", "2", "4", ..."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class LeNet(nn.Module):
    """LeNet with pooling and activations as functions, and a flatten that follows the sizes."""

    def __init__(self, first: int = 20, second: int = 50, hidden: int = 500) -> None:
        super().__init__()
        self.second = second
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(second * 16, hidden)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


def small_lenet() -> LeNet:
    return LeNet(6, 10, 30)


class HardCoded(LeNet):
    """The same, with the flattened size written out."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * self.second)
        return self.fc2(F.relu(self.fc1(x)))


class CalledTwice(nn.Module):
    """One layer, called twice, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.shared = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.shared(torch.relu(self.shared(self.first(x))))))


class DataDependent(nn.Module):
    """What torch.export refuses: the path depends on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return self.last(y if x.sum().item() > 0 else y * 2)


class Branches(nn.Module):
    """A layer that only some calls reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.extra = nn.Linear(12, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(torch.relu(self.extra(x)) if extra else x)


class Tied(nn.Module):
    """A language model's head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.embedding(tokens))))


class Residual(nn.Module):
    """An addition, where nothing may vanish on one side only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(x + torch.relu(self.branch(x)))


class ReadsItsLayer(nn.Module):
    """A forward that looks at a layer from outside, as many do for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x.to(self.first.weight.dtype))))


class Net(nn.Module):
    """[N, 2, 5, 5] -> [N, 3]: a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.fc1 = nn.Linear(36, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.conv(x).relu().flatten(1)
        return self.fc2(self.fc1(x * scale).relu())


class Partial(nn.Module):
    """[N, 1, 6, 6] -> [N, 3], with a layer that never runs and one that runs on request."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten())
        self.fc1 = nn.Linear(20, 6)
        self.head = nn.Linear(6, 3)
        self.unused = nn.Linear(9, 9)
        self.extra = nn.Linear(3, 3)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        x = self.head(self.fc1(self.body(self.norm(self.conv1(x)))).relu())
        return self.extra(x) if extra else x


class TwoReaders(nn.Module):
    """One layer's units, read by two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.left = nn.Linear(12, 5)
        self.right = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return torch.cat([self.left(x), self.right(x)], 1)


class LinearStream(nn.Module):
    """A hidden vector to which a second layer adds, so that two layers make its units."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(h + torch.tanh(self.second(h)))


class NormedStream(nn.Module):
    """A hidden vector with batch norms on it, which two blocks and the head read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.BatchNorm1d(8))
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x)


READERS = ("blocks.0.0", "blocks.1.0", "head")
"""The layers that read the hidden vector of a NormedStream."""


class WrittenOut(nn.Module):
    """Sizes written out, so that nothing compact can pass the view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 7, 3), nn.Linear(7 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu().view(-1, 7 * 16))


class InTraining(nn.Module):
    """In training alone, something else reads the hidden units too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.b(h) + (h.mean() if self.training else 0.0)


class Noisy(nn.Module):
    """A classifier of digits with noise and statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.norm(self.conv(x))).flatten(1)))


class Pair(nn.Module):
    """One hidden layer without gates of its own, which the forward may give out as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        h = self.a(x).relu()
        return h.mean() + self.b(h) if hidden else self.b(h)


class ByKeyword(nn.Module):
    """Takes keyword arguments alone, some of them no tensors, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(
        self,
        *,
        x: Tensor,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
        times: int = 1,
        activation: str = "relu",
        hidden: bool | None = None,
    ) -> Any:
        h = getattr(torch, activation)(self.a(x * times))
        h = torch.relu(self.b(h))
        y = self.c(h)
        if mask is not None:
            y = y * mask.unsqueeze(-1)
        given = {"y": y}
        if labels is not None:
            given["loss"] = nn.functional.cross_entropy(y, labels)
        if hidden:
            given["hidden"] = h.square().mean()
        return given
