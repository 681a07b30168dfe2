"""Layers that a model calls several times: gates counted once, removal where all calls agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, prune, sparsify_
from l0fast.layers.handle import gated_layers
from tests.helpers.thinned import thinned_product


class Siamese(nn.Module):
    """One network for two images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(12 * 36, 20), nn.ReLU(), nn.Linear(20, 10)),
        )
        self.head = nn.Linear(10, 1)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.head((self.net(one) - self.net(other)).abs())


class SharedHead(nn.Module):
    """One head for the hidden units of three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(nn.Linear(6, 16) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(torch.relu(body(x))) for body in self.bodies])


class Recurrent(nn.Module):
    """A block that reads what it has made."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encode(x))
        for _ in range(3):
            h = torch.tanh(h + self.down(torch.relu(self.up(h))))
        return self.head(h)


def images() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 8, 8).double(), torch.randn(2, 1, 8, 8).double()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], set[str]]] = {
    "siamese": (Siamese, images, {"net.3", "net.6", "net.8", "head"}),
    "shared head": (
        *(SharedHead, lambda: (torch.randn(5, 6).double(),)),
        {"bodies.0", "bodies.1", "bodies.2", "head.0", "head.2"},
    ),
    "recurrent": (
        *(Recurrent, lambda: (torch.randn(5, 6).double(),)),
        {"encode", "up", "down", "head"},
    ),
}


def closed(model: Any, x: tuple[Tensor, ...]) -> Any:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    sparsify_(model.double().eval(), example_inputs=x)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(9.0)
            layer.log_alpha[::2] = -9.0
    return model


@pytest.mark.parametrize("name", MODELS)
def test_what_all_calls_agree_on_goes(name: str) -> None:
    build, example, gated = MODELS[name]
    x = example()
    model = closed(build(), x)
    assert gated_layers(model).keys() == gated
    small: Any = prune(model, x)
    assert small.report.tier == "merged"
    torch.testing.assert_close(small(*x), model(*x), rtol=1e-12, atol=1e-12)
    for row in small.report.sites:
        gathers = name != "siamese" and row["name"] in (
            "bodies.0",
            "bodies.1",
            "bodies.2",
            "encode",
        )
        assert row["status"] == ("compacted" if gathers else "removed")
        assert row["in"][0] in (1, row["in"][1] // 2)
    fresh = example()
    torch.testing.assert_close(small(*fresh), model(*fresh), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "measure"), thinned_product(2, MODELS, ["params", "macs"]))
def test_each_gate_counts_once_and_each_call_costs(name: str, measure: str) -> None:
    build, example, _ = MODELS[name]
    x = example()
    model = closed(build(), x)
    constraint = DensityConstraint(model, 0.5, measure=measure, example_inputs=x)
    kept, total = getattr(prune(model, x).report, measure)  # type: ignore[arg-type]
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.copy_(torch.where(layer.log_alpha > 0, torch.inf, -torch.inf))
    assert float(constraint.densities().detach()) == pytest.approx(kept / total, rel=1e-9)


class Apart(nn.Module):
    """The second call reads what must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.again(torch.relu(self.first(x))) + self.again(x.sort(-1).values)
        return self.head(torch.relu(h))


def test_a_call_that_cannot_follow_keeps_what_the_others_read() -> None:
    x = torch.randn(5, 6).double()
    model = closed(Apart(), (x,))
    assert gated_layers(model).keys() == {"first", "head"}
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert (small.again.in_features, small.again.out_features) == (6, 4)


class Constants(nn.Module):
    """Closed units arrive as one constant in the first call, and as another in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.read, self.head = nn.Conv2d(4, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = (norm(conv(x)) for norm, conv in zip(self.norms, (self.a, self.b), strict=True))
        return self.head(torch.relu(self.read(one) - 2 * self.read(two)).mean((2, 3)))


def test_constants_that_differ_between_calls_are_not_folded() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8).double()
    model: Any = Constants().double().eval()
    for norm in model.norms:
        nn.init.normal_(norm.bias)
    sparsify_(model, gates="output", include=["a", "b"], example_inputs=x)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha[1] = -9.0
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small.report.folded == []
    with torch.no_grad():
        model.norms[1].bias.copy_(model.norms[0].bias)
    same: Any = prune(model, x)
    torch.testing.assert_close(same(x), model(x), rtol=1e-12, atol=1e-12)
    assert same.report.folded == ["read"]
    assert same.read.in_channels == 3
