"""Losses, metrics and batches of the user's own: tensors, DataLoaders, anything iterable."""

from __future__ import annotations

import json
import math
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset, default_collate

from l0fast import Trainer, TrainerSettings
from l0fast.data.sets import SPLITS, Data, Split
from l0fast.layers.handle import gated_layers
from l0fast.training.batches import STRIDE
from l0fast.training.folder import METRICS, SUMMARY
from l0fast.training.task import TASKS
from tests.helpers.runs import quick, small_mlp
from tests.helpers.same_run import Stop, assert_same, assert_same_run, state
from tests.helpers.thinned import telling

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS: dict[str, Any] = {"density": 0.5, "epochs": 4, "batch_size": 100, "target_warmup": 0.2}


class InOrder(Sampler[int]):
    """The order that the trainer gives to tensors; `set_epoch` says of which epoch."""

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch + 0 * STRIDE)
        return iter(torch.randperm(self.count, generator=generator).tolist())

    def __len__(self) -> int:
        return self.count


class Drawing(Dataset[Any]):
    """Examples that are changed by every generator there is."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = float(torch.rand(()) + random.random() + np.random.rand())
        return self.split.inputs[index] + 0.1 * noise, self.split.targets[index]


def loader(split: Split, **options: Any) -> DataLoader[Any]:
    chosen: dict[str, Any] = {"batch_size": 100} | options
    return DataLoader(TensorDataset(*split), **chosen)


def interrupted(make: Any, folder: Path, **options: Any) -> Trainer:
    """A run that is stopped after its second epoch and resumed ends as another: the whole one."""
    whole: Trainer = make(folder / "whole", **options)
    whole.fit()

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Stop("stopped")

    with pytest.raises(Stop, match="stopped"):
        make(folder / "out", **options).fit(on_epoch=stop)
    torch.manual_seed(99)  # another process draws something else
    random.seed(99)
    np.random.seed(99)
    make(folder / "out", **options).fit(resume=True)
    assert_same_run(folder / "out", folder / "whole")
    return whole


# --- where batches come from ---------------------------------------------------------------------


def test_a_loader_takes_the_training_of_the_tensors(digits: Data, tmp_path: Path) -> None:
    """The same batches in the same order: the same weights, gates, multipliers and metrics."""
    streamed = Data(
        loader(digits.train, sampler=InOrder(len(digits.train.targets))),
        loader(digits.validation, batch_size=7),
        [(digits.test.inputs, digits.test.targets)],
    )
    for name, data in (("tensors", digits), ("streams", streamed)):
        Trainer(small_mlp(), data, quick(**SETTINGS), out=tmp_path / name, device="cpu").fit()
    one, other = state(tmp_path / "tensors"), state(tmp_path / "streams")
    assert_same(other["model"], one["model"])
    assert_same(other["term"], one["term"])
    texts = [(tmp_path / name / METRICS).read_text() for name in ("tensors", "streams")]
    for first, second in zip(*(map(json.loads, text.splitlines()) for text in texts), strict=True):
        assert first == second


@pytest.mark.parametrize("workers", telling([0, 2], [0]))
def test_a_resumed_stream_draws_what_it_would_have(
    digits: Data, tmp_path: Path, workers: int
) -> None:
    few = Split(digits.train.inputs[:300], digits.train.targets[:300])
    orders: list[Tensor] = []

    def make(out: Path, **_: Any) -> Trainer:
        torch.manual_seed(0)
        options: dict[str, Any] = {"batch_size": 100, "shuffle": True, "num_workers": workers}
        options["generator"] = torch.Generator().manual_seed(len(orders)) if workers else None
        train, test = DataLoader(Drawing(few), **options), loader(digits.test)
        one = Trainer(small_mlp(), Data(train, None, test), quick(**SETTINGS), out=out)
        one.model.register_forward_pre_hook(
            lambda model, inputs: orders.append(inputs[0]) if model.training else None
        )
        return one

    interrupted(make, tmp_path)
    epochs = [torch.cat(orders[3 * n : 3 * n + 3]) for n in range(4)]
    assert len({float(epoch.double().sum()) for epoch in epochs}) == 4  # another noise in each


def test_batches_that_do_not_fit_the_task(digits: Data) -> None:
    x, y = (part[:40] for part in digits.train)
    for tensors, message in (
        ((x, y.int()), "targets: got 'torch.int32 of shape (40,)'; expected int64 classes of"),
        ((x, F.one_hot(y)), "targets: got 'torch.int64 of shape (40, 10)'; expected int64 classes"),
        ((x, y, y), "batch: got 'tuple of 3'; expected (inputs, targets), or a loss_fn"),
    ):
        one = Trainer(small_mlp(), Data([tensors], None, digits.test), quick(), device="cpu")
        with pytest.raises(ValueError, match="expected") as caught:
            one.fit()
        assert str(caught.value).startswith(message)


def test_what_no_training_can_be_made_of(digits: Data) -> None:
    x, y = digits.train
    model, frozen = small_mlp(), small_mlp().requires_grad_(False)
    arrays: Any = (x.numpy(), y.numpy())
    splits: Any = tuple(digits[:3])
    for given, data, error, message in (
        (frozen, digits, ValueError, "model: got 'Sequential'; expected a model with a para"),
        (model, splits, TypeError, "data: got 'tuple'; expected l0fast.data.sets.Data(train, val"),
        (model, Data(arrays, None, digits.test), TypeError, "data.train: got '(ndarray (1"),
        (model, Data((x, y[0]), None, digits.test), TypeError, "data.train: got '(Tensor torch"),
    ):
        with pytest.raises(error, match="expected") as caught:
            Trainer(given, data, quick(density=0.5), device="cpu")
        assert str(caught.value).startswith(message)
        assert len(str(caught.value)) < 200
        assert not gated_layers(given)


def test_few_batches_of_a_stream_are_held_at_once(digits: Data, tmp_path: Path) -> None:
    """The first one, as the example, and those of one step, however many there are."""
    made: list[weakref.ref[Tensor]] = []
    most: list[int] = []

    def collated(examples: Any) -> Any:
        inputs, targets = default_collate(examples)
        made.append(weakref.ref(inputs))
        most.append(sum(one() is not None for one in made))
        return inputs, targets

    options: dict[str, Any] = {"batch_size": 20, "collate_fn": collated}
    splits: Any = [loader(getattr(digits, name), **options) for name in SPLITS]
    chosen = quick(**SETTINGS | {"epochs": 1}, accumulate=2)
    Trainer(small_mlp(), Data(*splits), chosen, out=tmp_path / "x", device="cpu").fit()
    assert len(most) >= sum(map(len, splits)) == 90
    assert max(most) <= 4


def test_what_is_no_stream_is_refused(digits: Data, tmp_path: Path) -> None:
    good = loader(digits.test)
    persistent = loader(digits.train, num_workers=1, persistent_workers=True)
    sized = type("Sized", (), {"__iter__": lambda _: iter(good), "__len__": lambda _: 9})()
    for train, error, message in (
        (iter(good), TypeError, "data.train: got '_SingleProcessDataLoaderIter'; expected a Split"),
        ((x for x in good), TypeError, "data.train: got 'generator'; expected a Split, or"),
        (filter(None, good), TypeError, "data.train: got 'filter'; expected a Split, or batches"),
        ({}, ValueError, "data.train: got 'dict'; expected a length: its number of batches"),
        (persistent, ValueError, "data.train.persistent_workers: got True; expected False: work"),
        (3, TypeError, "data.train: got 'int'; expected a Split, or batches that can be"),
    ):
        with pytest.raises(error, match="expected") as caught:
            Trainer(small_mlp(), Data(train, None, good), quick(), out=tmp_path / "x")
        assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"^augment: got 'crop'; expected 'none' for a stream"):
        Trainer(small_mlp(), Data(good, None, good), quick(augment="crop"))
    with pytest.raises(ValueError, match=r"^data.train: got '4 batches'; expected 9, as its leng"):
        Trainer(small_mlp(), Data(sized, None, good), quick(), device="cpu").fit()
    assert not (tmp_path / "x").exists()


# --- what is minimised ---------------------------------------------------------------------------


def numbers(digits: Data) -> Data:
    """The first pixels' sums and means, to be told from the images."""

    def split(one: Split) -> Split:
        pixels = one.inputs.flatten(1)
        return Split(one.inputs, torch.stack([pixels[:, 2:5].sum(1), pixels.mean(1)], 1))

    return Data(split(digits.train), None, split(digits.test), 2, "regression")


def model_of(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, outputs))


def test_regression_and_labels(digits: Data, tmp_path: Path) -> None:
    """Learned under the constraint, with metrics by their names, resumed bit for bit."""
    labels = digits._replace(
        train=Split(digits.train.inputs, F.one_hot(digits.train.targets, 10).float()),
        test=Split(digits.test.inputs, F.one_hot(digits.test.targets, 10).float()),
        validation=None,
    )
    for task, data, outputs, metric in (
        ("regression", numbers(digits), 2, "squared_error"),
        ("multilabel", labels, 10, "label_error_percent"),
    ):

        def make(out: Path, task: str, data: Data, outputs: int) -> Trainer:
            torch.manual_seed(0)
            chosen = quick(**SETTINGS, task=task)
            return Trainer(model_of(outputs), data, chosen, out=out, device="cpu")

        one = interrupted(make, tmp_path / task, task=task, data=data, outputs=outputs)
        summary = json.loads((tmp_path / task / "whole" / SUMMARY).read_text())
        assert summary["metric"] == metric
        assert summary["feasible"] is True
        first, last = one.history[0], one.history[-1]
        assert last["loss"] < 0.7 * first["loss"]
        assert last[f"test_{metric}"] < first[f"test_{metric}"]
        with torch.no_grad():
            out = one.pruned.eval()(data.test.inputs)  # type: ignore[union-attr]
        if task == "regression":
            wanted = float(F.mse_loss(out, data.test.targets))
            assert first["loss"] == pytest.approx(first[f"train_{metric}"], rel=1e-5)
        else:
            wanted = 100 * float(((out > 0) != (data.test.targets > 0.5)).double().mean())
        assert summary[f"test_{metric}"] == pytest.approx(wanted, rel=1e-5)
        assert "test_error_percent" not in summary


def test_the_users_own_loss_and_metric(digits: Data, tmp_path: Path) -> None:
    """Batches are dicts, the loss is of a reconstruction and draws from Python and NumPy, the
    metric has its function's name."""

    def batches(split: Split) -> list[dict[str, Tensor]]:
        return [{"pixels": x.flatten(1)} for x in split.inputs.split(100)]

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = F.mse_loss(model(batch["pixels"]), batch["pixels"])
        return loss * random.gauss(1, 0.1) * np.random.uniform(0.9, 1) if model.training else loss

    def worst_pixel(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["pixels"]) - batch["pixels"]).abs().amax(1)

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))

    data = Data(batches(digits.train), batches(digits.validation), batches(digits.test))
    example = torch.zeros(1, 64)

    def make(out: Path, **options: Any) -> Trainer:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        chosen = quick(**SETTINGS, select="best")
        options = {"example_inputs": example, "out": out, "device": "cpu"} | options
        return Trainer(build(), data, chosen, loss_fn, **options)

    one = interrupted(make, tmp_path, metric=worst_pixel)
    summary = json.loads((tmp_path / "whole" / SUMMARY).read_text())
    x = digits.test.inputs.flatten(1)
    with torch.no_grad():
        wanted = (one.pruned.eval()(x) - x).abs().amax(1).mean()  # type: ignore[union-attr]
    assert summary["test_worst_pixel"] == pytest.approx(float(wanted), rel=1e-5)
    assert {"epoch", "loss", "validation_worst_pixel", "test_worst_pixel"} < one.history[0].keys()
    assert "train_worst_pixel" not in one.history[0]
    chosen = min(one.history[-1:], key=lambda row: row["validation_worst_pixel"])
    assert summary["selected_epoch"] == chosen["epoch"]

    def far_percent(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return worst_pixel(model, batch) * -1e6

    interrupted(make, tmp_path / "far", metric=far_percent)  # its numbers are resumed, too
    # Without a metric the loss is what is reported.
    plain = make(tmp_path / "c")
    summary = plain.fit()
    assert summary["metric"] == "loss"
    with torch.no_grad():
        wanted = F.mse_loss(plain.pruned.eval()(x), x)  # type: ignore[union-attr]
    assert summary["test_loss"] == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(ValueError, match=r"^metric: got 'loss'; expected 'worst_pixel', as in"):
        make(tmp_path / "whole").fit(resume=True)
    with pytest.raises(ValueError, match=r"^example_inputs: got None; expected the model's inputs"):
        make(tmp_path / "d", example_inputs=None)
    with pytest.raises(ValueError, match=r"^metric: got '<lambda>'; expected a function with a n"):
        make(tmp_path / "d", metric=lambda _model, _batch: torch.zeros(()))
    with pytest.raises(TypeError, match=r"^metric: got 3; expected a function of \(model, batch\)"):
        make(tmp_path / "d", metric=3)
    assert not (tmp_path / "d").exists()


def test_targets_that_do_not_fit_the_task(digits: Data) -> None:
    for task, outputs, message in (
        ("regression", 2, "targets: got 'shape (32, 1)'; expected shape (32, 2), that of the mod"),
        ("multilabel", 2, "data.train.targets: got '-"),
    ):
        targets = numbers(digits).train.targets[:, :1] - 5
        split = Split(digits.train.inputs, targets)
        data, settings = Data(split, None, split), quick(task=task)
        with pytest.raises(ValueError, match="expected") as caught:
            Trainer(model_of(outputs), data, settings, device="cpu").fit()
        assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match=r"^task: got 'sorting'; expected one of 'classification'"):
        TrainerSettings(task="sorting")


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_outputs_that_are_nan_are_no_correct_answers(
    digits: Data, tmp_path: Path, task: str
) -> None:
    """A comparison with NaN is False: the error would be that of another answer."""

    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_mlp()

        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)
            lost = torch.arange(len(out))[:, None] == 3
            return out if self.training else out.masked_fill(lost, torch.nan)

    def of(split: Split) -> list[Any]:
        one_hot = F.one_hot(split.targets, 10).float()
        return [(split.inputs, split.targets if task == "classification" else one_hot)]

    data = Data(of(digits.train), of(digits.validation), of(digits.test))
    settings = quick(density=None, epochs=2, task=task)
    one = Trainer(Lost(), data, settings, out=tmp_path / "run", device="cpu")
    key = TASKS[task].metric
    with pytest.warns(UserWarning, match=f"^(validation|test)_{key} is nan: the model, or the met"):
        summary = one.fit()
    assert all(math.isfinite(row["loss"]) for row in one.history)
    for row in one.history:
        assert math.isnan(row[f"validation_{key}"])
        assert math.isnan(row[f"test_{key}"])
    assert math.isnan(summary[f"test_{key}"])


def test_the_best_of_errors_some_of_which_are_nan(digits: Data) -> None:
    found = iter([math.nan, 7.0, 8.0])

    def given(model: nn.Module, batch: Any) -> Tensor:
        return torch.tensor(next(found))

    few = Data(digits.train, None, [(digits.test.inputs, digits.test.targets)])
    one = Trainer(small_mlp(), few, quick(density=None, epochs=3), metric=given, device="cpu")
    with pytest.warns(UserWarning, match="^test_given is nan: the model, or the metric, gives NaN"):
        assert one.fit()["best_test_given"] == 7.0
