"""What an example stands for: positional arguments, keyword arguments, or one argument."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from l0fast import density, measure_latency, prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers


class Batch(NamedTuple):
    a: Tensor
    b: Tensor


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.two(torch.relu(self.one(x)))


class Keywords(Body):
    def forward(self, *, x: Tensor, scale: Tensor) -> Tensor:
        return self.body(x * scale)


class Images(Body):
    """A list as its only argument."""

    def forward(self, images: list[Tensor]) -> Tensor:
        return self.body(torch.stack(images))


class Detection(Body):
    """As torchvision's detection models: two images could be two positional arguments."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Tensor:
        if not isinstance(images, list) or targets is not None:
            raise TypeError("images is expected to be a list of 3d tensors")
        return self.body(torch.stack(images))


class Fields(Body):
    def forward(self, batch: Batch) -> Tensor:
        return self.body(batch.a + batch.b)


class Several(Body):
    def forward(self, *images: Tensor) -> Tensor:
        return self.body(sum(images))  # type: ignore[arg-type]


class Pair(Body):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.body(first + second)


class Noisy(Body):
    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        self.noise = torch.rand(1)
        return self.body(x + self.noise)


def image(*batch: int) -> Tensor:
    return torch.randn(*batch, 3, 7, 7)


EXAMPLES: dict[str, tuple[type[Body], Any, Example]] = {}
for kind, given, how in (
    (Keywords, {"scale": torch.tensor(2.0), "x": image(2)}, "keywords"),
    (Images, [image(), image(), image()], "one"),
    (Detection, [image(), image()], "one"),
    (Detection, [image()], "one"),
    (Detection, ([image(), image()],), "positional"),
    (Fields, Batch(image(2), image(2)), "one"),
    (Fields, {"batch": Batch(image(2), image(2))}, "keywords"),
    (Several, [image(2), image(2)], "positional"),
    (Pair, [image(2), image(2)], "positional"),
    (Pair, (image(2), image(2)), "positional"),
):
    call = {
        "keywords": lambda given: Example(kwargs=given),
        "one": lambda given: Example((given,)),
        "positional": lambda given: Example(tuple(given)),
    }[how](given)
    EXAMPLES[f"{kind.__name__} {type(given).__name__} {len(given)}"] = kind, given, call


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_the_call_that_the_model_takes(name: str) -> None:
    kind, given, call = EXAMPLES[name]
    torch.manual_seed(0)
    model = kind().eval()
    found = Example.of(given, model)
    assert (len(found.args), found.kwargs.keys()) == (len(call.args), call.kwargs.keys())
    assert all(one is other for one, other in zip(found.args, call.args, strict=True))
    expected = call.call(model)
    assert sparsify_(model, example_inputs=given, density_init=1.0) is model
    torch.testing.assert_close(call.call(model), expected)
    assert list(gated_layers(model)) == ["one"]
    with torch.no_grad():
        model.one.log_alpha[:3] = -9.0  # type: ignore[index]
    small: Any = prune(model, given, 1.0, measure="macs")
    assert small.report.tier == "merged"
    assert small.one.out_channels == small.two.in_channels == 5
    torch.testing.assert_close(call.call(small), call.call(model))
    macs = density(model, given).total.macs
    assert macs is not None
    assert 0 < macs < small.report.macs[1]


def test_a_list_is_asked_about_before_a_latency_is_measured() -> None:
    table = measure_latency(sparsify_(Detection()), [image(), image()])
    assert set(table.layers) == {"one", "two"}


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (Images, [image(), torch.randn(2)]),
        (Detection, [torch.randn(2, 1)]),
        (Pair, Batch(*image(2))),
    ],
)
def test_what_a_model_takes_in_no_way_is_refused(kind: type[Body], given: Any) -> None:
    model = kind()
    with pytest.raises(ValueError, match=r"example_inputs: got .*what the model's forward takes"):
        sparsify_(model, example_inputs=given)
    assert not gated_layers(model)


def test_asking_leaves_the_model_and_the_generator_as_they_were() -> None:
    model, given = Noisy(), [image(2)]
    state = torch.random.get_rng_state()
    assert Example.of(given, model).args == tuple(given)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert model.noise.abs().max() == 0
