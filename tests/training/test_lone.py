"""Batches of which a forward sees one example, and models that cannot be trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from l0fast import Trainer
from l0fast.data.sets import Data, Split
from l0fast.layers.handle import gated_layers
from l0fast.training.batches import InMemory, sizes_of
from l0fast.training.lone import refuse_lone_examples
from l0fast.training.ranks import Ranks
from l0fast.training.streams import Streamed
from tests.helpers.runs import quick


class Net(nn.Module):
    """A batch norm over features, or over the pixels of images."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(64, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.second = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x.flatten(1))).relu())


def images() -> nn.Module:
    parts = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)
    return nn.Sequential(*parts)


def few(digits: Data, count: int) -> Data:
    train = Split(digits.train.inputs[:count], digits.train.targets[:count])
    return Data(train, None, digits.test, 10)


def trained(model: nn.Module, data: Data, **options: Any) -> Trainer:
    settings = quick(**{"epochs": 1, "density": 0.5, "settle": 0, **options})
    return Trainer(model, data, settings, device="cpu")


@pytest.mark.parametrize(
    ("count", "options", "got"),
    [
        (41, {"batch_size": 20}, "there is a batch of 1 in each epoch"),
        (1, {"batch_size": 20}, "there is a batch of 1 in each epoch"),
        (
            43,
            {"batch_size": 20, "accumulate": 2},
            "a batch of 3 in each epoch, in 2 parts",
        ),
        (40, {"batch_size": 20, "accumulate": 20}, "a batch of 20 in each epoch, in 20 parts"),
    ],
)
def test_a_lone_example_is_refused_before_training(
    digits: Data, count: int, options: dict[str, Any], got: str
) -> None:
    model = Net()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="expected two examples or more in each forward") as caught:
        trained(model, few(digits, count), **options)
    assert str(caught.value).startswith("batch_size: got 20; ")
    assert got in str(caught.value)
    assert not gated_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.norm.num_batches_tracked == 0  # pyright: ignore[reportAttributeAccessIssue]


def test_a_lone_example_is_trained_on_where_it_can_be(digits: Data) -> None:
    dense = {"density": None, "batch_size": 20}
    trained(Net(), few(digits, 42), **dense)
    trained(Net(norm=False), few(digits, 41), **dense)
    frozen = Net()
    frozen.norm.train = lambda mode=True: frozen.norm  # type: ignore[method-assign]
    frozen.norm.training = False
    trained(frozen, few(digits, 41), **dense)
    trained(images(), few(digits, 41), **dense)  # it sees 36 pixels


def test_a_lone_example_of_a_stream(digits: Data) -> None:
    dataset = TensorDataset(digits.train.inputs[:41], digits.train.targets[:41])
    data = Data(DataLoader(dataset, batch_size=20), None, digits.test)
    with pytest.raises(ValueError, match=r"^data.train: got 'a batch of 1 .*drop_last=True"):
        trained(Net(), data)
    rest_dropped = DataLoader(dataset, batch_size=20, drop_last=True)
    trained(Net(), data._replace(train=rest_dropped), density=None)


def test_the_sizes_of_batches(digits: Data) -> None:
    assert sizes_of(41, 20) == {20, 1}
    assert sizes_of(40, 20) == {20}
    assert sizes_of(7, 20) == {7}
    assert sizes_of(41, 20, drop_last=True) == {20}

    class Unknown(IterableDataset[Any]):
        def __len__(self) -> int:
            return 41

        def __iter__(self) -> Iterator[Any]:
            return iter(dataset)

    dataset = TensorDataset(*digits.test)
    batches: Any = [list(range(41))]
    for stream, sizes in (
        (DataLoader(dataset, batch_size=359), {359, 1}),
        (DataLoader(Unknown(), batch_size=20), set()),
        (DataLoader(dataset, batch_sampler=batches), set()),
        ([(digits.test.inputs, digits.test.targets)], set()),
    ):
        assert Streamed("data.train", stream, 0, torch.device("cpu")).sizes == sizes


def test_on_several_processes(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 3 leaves one of two processes an example."""
    settings = quick(batch_size=20, density=0.5)
    train = InMemory(few(digits, 43).train, settings, torch.device("cpu"))
    refuse_lone_examples(Net(), train, settings, digits.train.inputs[:1])
    monkeypatch.setattr(Ranks, "here", lambda: Ranks(1, 2))
    with pytest.raises(ValueError, match="a batch of 3 in each epoch, in 2 parts"):
        refuse_lone_examples(Net(), train, settings, digits.train.inputs[:1])
