"""Tables of the user's own, .npz and .pt: read, split, told apart by their targets, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from l0fast.data import sets

X = np.arange(40, dtype=np.int16).reshape(20, 2)
TARGETS: dict[str, Any] = {
    "regression": np.linspace(0, 1, 20),
    "classification": np.arange(20) % 3,
    "multilabel": np.arange(60).reshape(20, 3) % 2 == 0,
}


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize("task", TARGETS)
def test_the_task_is_told_by_the_targets(tmp_path: Path, task: str, suffix: str) -> None:
    path = str(tmp_path / f"table{suffix}")
    arrays = {"inputs": X, "targets": TARGETS[task]}
    if suffix == ".npz":
        np.savez(path, inputs=X, targets=TARGETS[task])
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    loaded = sets.load("arrays", path, 0.25)
    assert loaded.task == task
    assert loaded.num_classes == {"regression": 1, "classification": 3, "multilabel": 3}[task]
    parts = [loaded.train, loaded.validation, loaded.test]
    assert [len(part.targets) for part in parts] == [12, 4, 4]
    rows = torch.cat([part.inputs for part in parts])
    assert rows.dtype == torch.float32
    order = (rows[:, 0] / 2).long()
    assert sorted(order.tolist()) == list(range(20))
    targets = torch.cat([part.targets for part in parts])
    wanted = torch.from_numpy(TARGETS[task])[order]
    if task == "classification":
        assert torch.equal(targets, wanted)
    else:
        assert torch.equal(targets, wanted.float().reshape(20, -1))
    assert torch.equal(sets.load("arrays", path, 0.25, seed=1).test.inputs, loaded.test.inputs)


def test_a_test_of_its_own_and_another_task(tmp_path: Path) -> None:
    path = str(tmp_path / "table.npz")
    labels = TARGETS["multilabel"].astype(np.int32)
    train, test = (X[:15], labels[:15]), (X[15:], labels[15:])
    np.savez(
        path,
        train_inputs=train[0],
        train_targets=train[1],
        test_inputs=test[0],
        test_targets=test[1],
    )
    loaded = sets.load("arrays", path)
    assert (loaded.task, len(loaded.train.targets), loaded.validation) == ("multilabel", 15, None)
    assert torch.equal(loaded.test.inputs, torch.from_numpy(X[15:]).float())
    numbers = sets.load("arrays", path, task="regression")
    assert (numbers.task, numbers.num_classes) == ("regression", 3)


@pytest.mark.parametrize(
    ("arrays", "task", "message"),
    [
        ({"x": X}, None, "(this one has ['x'])"),
        ({"inputs": X, "targets": X[:3]}, None, "(its inputs and targets are (20, 2) and (3, 2))"),
        ({"inputs": X[:, 0], "targets": X[:, 0]}, None, "(its inputs and targets are (20,) and"),
        (
            {"inputs": X, "targets": X / 3},
            "classification",
            "which cannot be classes; name another --task)",
        ),
        ({"inputs": X, "targets": np.array([{}] * 20)}, None, "Object arrays cannot be loaded"),
        ({"inputs": X, "targets": X[:, :0]}, None, "inputs and targets are (20, 2) and (20, 0))"),
        ({"inputs": X[:1], "targets": X[:1]}, None, "(this one has a single example, so there"),
        ({"inputs": X + 1j, "targets": X}, None, "(its inputs are torch.complex128, torch.strided"),
        (b"PK", None, "a file .npz or .pt with the arrays inputs, targets, or with"),
        (None, None, "(there is no such file)"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, arrays: Any, task: str | None, message: str
) -> None:
    path = tmp_path / "table.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"^dataset: got '.*table.npz'; expected ") as caught:
        sets.load("arrays", str(path), task=task)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"test_targets": np.ones((5, 2))},
            "test_targets: got 'shape (5, 2)'; expected shape (N, 3), as train_targets of "
            "'{path}', which is (20, 3)",
        ),
        (
            {"test_targets": np.ones(5)},
            "test_targets: got 'shape (5,)'; expected shape (N, 3), as train_targets of "
            "'{path}', which is (20, 3)",
        ),
        (
            {"train_targets": np.ones(20), "test_targets": np.ones((5, 1))},
            "test_targets: got 'shape (5, 1)'; expected shape (N,), as train_targets of "
            "'{path}', which is (20,)",
        ),
        (
            {"test_inputs": np.ones((5, 7))},
            "test_inputs: got 'shape (5, 7)'; expected shape (N, 2), as train_inputs of "
            "'{path}', which is (20, 2)",
        ),
        (
            {"test_targets": np.ones((5, 3), dtype=np.int32)},
            "test_targets: got 'torch.int32'; expected floating numbers, as train_targets of "
            "'{path}', which is torch.float64",
        ),
    ],
    ids=["targets", "dims", "column", "inputs", "kind"],
)
def test_a_test_unlike_the_training_is_refused(
    tmp_path: Path, changes: Any, message: str, suffix: str
) -> None:
    path = str(tmp_path / f"table{suffix}")
    arrays = {"train_inputs": X, "train_targets": np.ones((20, 3)), "test_inputs": X[:5]}
    arrays |= {"test_targets": np.ones((5, 3))} | changes
    if suffix == ".npz":
        np.savez(path, **arrays)
    else:
        torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, path)
    with pytest.raises(ValueError, match=r"^test_") as caught:
        sets.load("arrays", path)
    assert str(caught.value) == message.replace("{path}", path)


def test_two_examples_are_divided(tmp_path: Path) -> None:
    """A fifth of two would be none to test on."""
    path = str(tmp_path / "table.npz")
    np.savez(path, inputs=X[:2], targets=np.arange(2))
    loaded = sets.load("arrays", path, 1 / 12)
    assert (len(loaded.train.targets), loaded.validation, len(loaded.test.targets)) == (1, None, 1)


def test_numbers_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    """The model would have an output for each number below the largest."""
    path = str(tmp_path / "table.npz")
    np.savez(path, inputs=X, targets=np.arange(20) * 10**6)
    with pytest.raises(ValueError, match=r"a class is number 19,000,000 of 20 examples: number th"):
        sets.load("arrays", path)
    assert sets.load("arrays", path, task="regression").num_classes == 1
    np.savez(path, inputs=X, targets=np.arange(20) * 50)
    assert sets.load("arrays", path).num_classes == 951


def test_unsigned_classes(tmp_path: Path) -> None:
    path = str(tmp_path / "table.npz")
    np.savez(path, inputs=X, targets=(np.arange(20) % 3).astype(np.uint64))
    loaded = sets.load("arrays", path)
    assert (loaded.task, loaded.num_classes, loaded.train.targets.dtype) == (
        *("classification", 3),
        torch.int64,
    )


def test_only_arrays_have_a_task() -> None:
    with pytest.raises(ValueError, match=r"^task: got 'regression'; expected 'classification', as"):
        sets.load("digits", task="regression")
