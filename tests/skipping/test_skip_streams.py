"""Skipping through residual streams, parallel branches and concatenations: the very same step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import l0fast
import tests.helpers.plain_models as plain
from l0fast import sparsify_
from l0fast.layers.handle import gated_layers, gates
from l0fast.skipping.attach import stop_skipping
from l0fast.skipping.skip import MULTIPLE
from tests.helpers.draws import compact
from tests.helpers.steps import EXACT, assert_same_step, following, set_density, step
from tests.helpers.thinned import thinned_product


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, and its norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A residual block, with a shortcut where the width changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, width, 3, stride), conv(width, width)
        self.shortcut = conv(inputs, width, 1, stride) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x).relu())
        y += self.shortcut(x)
        return y.relu()


def resnet() -> nn.Module:
    """Two streams, of 9 and 14 channels."""
    return nn.Sequential(
        conv(3, 9),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(9, 9, 1),
        Block(9, 9, 1),
        Block(9, 14, 2),
        Block(14, 14, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(14, 5),
    )


class BeforeTheSum(nn.Module):
    """A block whose norm comes first, as in wide ResNets: the stream itself has none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.BatchNorm2d(width), nn.BatchNorm2d(6)
        self.first = nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.second = nn.Conv2d(6, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.inner(self.first(self.norm(x).relu())).relu())


def wide() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 9, 3, padding=1, bias=False),
        BeforeTheSum(9),
        BeforeTheSum(9),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )


class Branches(nn.Module):
    """Two branches one behind the other, which two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 8), conv(8, 7, 1), conv(8, 6)
        self.c, self.d = conv(13, 5, 1), conv(13, 5)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = torch.cat([self.a(x), self.b(x)], 1).relu()
        return self.last((self.c(x) + self.d(x)).relu().mean((2, 3)))


class Scaled(nn.Module):
    """Squeeze and excite: a branch makes what the channels are multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = conv(3, 8), conv(8, 5)
        self.squeeze, self.excite = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        scale = self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.last(self.next(x * scale).relu().mean((2, 3)))


class Inverted(nn.Module):
    """An inverted residual: wide and depthwise inside, beside a stream."""

    def __init__(self, width: int, hidden: int, bias: bool = False) -> None:
        super().__init__()
        self.expand, self.project = conv(width, hidden, 1), conv(hidden, width, 1)
        self.spread = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias)
        self.norm = nn.Identity() if bias else nn.BatchNorm2d(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.norm(self.spread(self.expand(x).relu())).relu())


def mobile(bias: bool = False) -> nn.Module:
    blocks = [Inverted(7, 13, bias), Inverted(7, 12, bias)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)]
    return nn.Sequential(conv(3, 7), *blocks, *pool)


def behind_gates_on_outputs() -> nn.Module:
    spread = nn.Conv1d(9, 9, 3, groups=9)
    nn.init.zeros_(spread.bias)  # type: ignore[arg-type]
    ends = [nn.Tanh(), nn.Conv1d(9, 5, 1), nn.Tanh(), nn.Conv1d(5, 4, 1)]
    return nn.Sequential(nn.Conv1d(3, 9, 1), spread, *ends)


class Sum(nn.Module):
    """What one layer closes, another may add to: it is no zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 9), nn.Linear(6, 9)
        self.c, self.d = nn.Linear(9, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c((self.a(x) + self.b(x)).tanh()).tanh())


class Partly(nn.Module):
    """The half of a concatenation is also read by what has no gates."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(6, 8),
            nn.Linear(6, 8),
            nn.Linear(16, 5),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x).relu(), self.b(x).relu()
        return self.c(torch.cat([first, second], -1)) + self.d(first)


Make = Callable[[], nn.Module]
IMAGE = (4, 3, 8, 8)
# Name -> (the model, shape of its input, options of sparsify_, how many layers make each link's
# channels: 0 where what arrives is full)
MODELS: dict[str, tuple[Make, tuple[int, ...], dict[str, Any], list[int]]] = {
    # Two streams, and what is inside of the four blocks.
    "resnet": (resnet, IMAGE, {}, [1, 1, 1, 1, 3, 3]),
    "norms first": (wide, IMAGE, {}, [1, 1, 3]),
    "branches": (Branches, IMAGE, {}, [1, 2, 2]),
    "squeeze and excite": (Scaled, IMAGE, {}, [1, 1, 2]),
    "depthwise": (mobile, IMAGE, {}, [1, 1, 3]),
    "depthwise with biases": (lambda: mobile(bias=True), IMAGE, {}, [1, 1, 3]),
    # Closed units arrive as zeros today; with a bias that learns they will not.
    "depthwise behind gates on outputs": (
        behind_gates_on_outputs,
        (4, 3, 7),
        {"gates": "output", "exclude": "1"},
        [1],
    ),
    "own gates": (lambda: plain.LinearStream(6, 11, 5), (7, 6), {"gates": "input"}, [0, 2]),
    "a sum of gates on outputs": (Sum, (7, 6), {"gates": "output", "exclude": "d"}, [1]),
    "a reader without gates": (Partly, (7, 6), {"include": "c", "gates": "input"}, [0]),
}


def prepared(name: str, skip: Any, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape, options, _ = MODELS[name]
    model = make().to(dtype)
    x = torch.randn(shape, dtype=dtype)
    return sparsify_(model, example_inputs=x, skip=skip, **options), x


@pytest.mark.parametrize("name", MODELS)
def test_the_links_that_are_found(name: str) -> None:
    model, _ = prepared(name, True)
    assert sorted(len(link.makers) for link in gates(model).skipping.links) == MODELS[name][3]


@pytest.mark.parametrize(
    ("name", "density", "multiple"), thinned_product(5, MODELS, [0.0, 0.3, 0.8], [1, MULTIPLE])
)
def test_loss_and_gradients_are_those_of_the_masked_step(
    name: str, density: float, multiple: int
) -> None:
    masked, x = prepared(name, False)
    skipped, _ = prepared(name, True)
    gates(skipped).skipping.multiple = multiple
    for model in (masked, skipped):
        set_density(model, density)
    assert_same_step(masked, skipped, x, EXACT)


def test_nothing_of_a_stream_is_as_wide_as_it_could_be() -> None:
    model, x = prepared("resnet", True)
    set_density(model, 0.3)
    widths: dict[str, list[int]] = {"native_batch_norm": [], "add_": []}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.__name__.split(".")[0]
            if name in widths and args[0].dim() == 4:
                widths[name].append(args[0].shape[1])
            return func(*args, **(kwargs or {}))

    with Watch():
        model(x)
    norms, sums = widths.values()
    assert len(norms) == 10
    assert max(norms[:5]) < 9
    assert max(norms[5:]) < 14
    assert len(sums) == 4
    assert max(sums[:2]) < 9
    assert max(sums[2:]) < 14


def test_each_maker_of_a_concatenation_rounds_up() -> None:
    model, x = prepared("branches", True)
    by_reader: Any = model.get_submodule("c.0")
    with torch.no_grad():
        by_reader.log_alpha.fill_(-40.0)
        by_reader.log_alpha[[0, 1, 2, 3, 4, 12]] = 40.0  # five of seven, and one of six
    step(model, x)
    rows: list[int] = []
    for name in ("a.0", "b.0"):
        rows.append(len(compact(model.get_submodule(name)).rows))
    assert rows == [7, 4]
    assert len(compact(by_reader).cols) == 11


def test_statistics_of_absent_channels_stay_as_they_are() -> None:
    """In all norms of a stream alike; those of the others are the masked step's."""
    model, x = prepared("resnet", True)
    stream: Any = model.get_submodule("3.first.0")
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(40.0)
        stream.log_alpha[1:5] = -40.0
    gates(model).skipping.multiple = 1
    masked = copy.deepcopy(model)
    stop_skipping(masked)
    for one in (masked, model):
        step(one, x)
    there = torch.tensor([0, 5, 6, 7, 8])
    for name in ("0.1", "3.second.1", "4.second.1"):
        before, after = masked.get_submodule(name), model.get_submodule(name)
        for kind, start in (("running_mean", 0.0), ("running_var", 1.0)):
            got, expected = after.get_buffer(kind), before.get_buffer(kind)
            torch.testing.assert_close(got[there], expected[there], rtol=EXACT, atol=EXACT)
            assert got[1:5].tolist() == [start] * 4
            assert bool((expected[1:5] != start).all())


def test_a_single_example_with_one_pixel_left_can_be_followed() -> None:
    """In training a norm refuses it; a training has one as its example, and then whole batches."""
    torch.manual_seed(0)
    model = resnet().double()
    sparsify_(model, example_inputs=torch.randn(1, 3, 3, 3).double(), skip=True)
    set_density(model, 0.3)
    masked = copy.deepcopy(model)
    stop_skipping(masked)
    x, outputs = torch.randn(6, 3, 3, 3).double(), list[Tensor]()
    for one in (masked, model):
        torch.manual_seed(1)
        outputs.append(one(x))
    torch.testing.assert_close(*outputs, rtol=EXACT, atol=EXACT)
    first: Any = model.get_submodule("0.0")
    compact: Any = following(first).compact
    assert len(compact.rows) < 9


def test_a_stream_of_training_steps_stays_together() -> None:
    weights: list[list[Tensor]] = []
    for how in (False, True):
        torch.manual_seed(0)
        model = resnet().double()
        x, y = torch.randn(8, 8, 3, 8, 8).double(), torch.randint(5, (8, 8))
        sparsify_(model, example_inputs=x[0], skip=how)
        constraint = l0fast.DensityConstraint(model, 0.3, dual=l0fast.DualAscent(0.05))
        optimizer = torch.optim.SGD(l0fast.param_groups(model, 0.05, 1.0))
        for index in range(24):
            (F.cross_entropy(model(x[index % 8]), y[index % 8]) + constraint()).backward()
            optimizer.step()
            optimizer.zero_grad()
            constraint.step()
        weights.append([parameter.detach() for parameter in model.parameters()])
    for got, expected in zip(*weights, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
