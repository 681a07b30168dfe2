"""TensorBoard's scalars: what is written, once for each epoch, and a run without TensorBoard."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import Trainer, TrainerSettings
from l0fast.data import sets
from l0fast.training import models
from l0fast.training.tensorboard import TENSORBOARD, scalar_writer, scalars
from tests.helpers.same_run import read_scalars

ROW: dict[str, Any] = {
    "epoch": 1,
    "loss": 0.5,
    "test_error_percent": 12.5,
    "expected_density": 0.75,
    "collapsed": ["fc1"],
    "layers": {"fc1": {"kept": 0, "of": 8, "expected_density": 0.25}},
    "lambda": {"fc1": 2.0, "fc2": 0.125},
    "restarts": {"fc1": 0, "fc2": 3},
}
TAGS = {
    "loss": 0.5,
    "test_error_percent": 12.5,
    "expected_density": 0.75,
    "lambda/fc1": 2.0,
    "lambda/fc2": 0.125,
    "restarts/fc1": 0,
    "restarts/fc2": 3,
}


def row(epoch: int, loss: float) -> dict[str, Any]:
    return {"epoch": epoch, "loss": loss}


def run(out: Path, epochs: int) -> Trainer:
    """A run of the embedded digits, resumed where there is one."""
    torch.manual_seed(0)
    model = models.build("mlp", (1, 8, 8), 10, (8, 4))
    settings = TrainerSettings(density=0.5, epochs=epochs, batch_size=500)
    return Trainer(model, sets.load("digits"), settings, out=out, device="cpu")


def test_tags() -> None:
    assert scalars(ROW) == TAGS


def test_a_row_is_written_at_its_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with scalar_writer(tmp_path, []) as write:
        write(ROW)
        assert read_scalars(tmp_path) == {tag: [(1, value)] for tag, value in TAGS.items()}


@pytest.mark.parametrize("written", [0, 1, 2, 3], ids=lambda n: f"{n} written")
def test_a_resumed_run_has_each_epoch_once(tmp_path: Path, written: int) -> None:
    """The checkpoint is at epoch 2; the killed run had written less, as much, or more."""
    pytest.importorskip("tensorboard")
    with scalar_writer(tmp_path, []) as write:
        for epoch in range(1, written + 1):
            write(row(epoch, -1.0))
    history = [row(1, 4.0), row(2, 3.0)]
    with scalar_writer(tmp_path, history) as write:
        write(row(3, 2.0))
    assert read_scalars(tmp_path) == {"loss": [(1, 4.0), (2, 3.0), (3, 2.0)]}


def test_a_run_writes_all_its_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    one = run(tmp_path / "run", 3)
    one.fit()
    found = read_scalars(tmp_path / "run")
    assert found.keys() == scalars(one.history[0]).keys() >= {"loss", "lambda/model"}
    for tag, points in found.items():
        assert [step for step, _ in points] == [1, 2, 3]
        wanted = [scalars(row)[tag] for row in one.history]
        assert [value for _, value in points] == pytest.approx(wanted, rel=1e-6)
    run(tmp_path / "run", 3).fit(resume=True)
    assert read_scalars(tmp_path / "run") == found


class Full:
    """A file on a disk that has no room from its `left`-th write on."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def write(self, data: Any) -> int:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()


@pytest.mark.parametrize("left", [0, 2])
def test_a_full_disk_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """One warning; all else is written, and what was written can be read; a resumed run has it
    all."""
    pytest.importorskip("tensorboard")
    opened = Path.open

    def full(path: Path, *args: Any, **options: Any) -> Any:
        file = opened(path, *args, **options)
        return Full(file, left) if "tfevents" in path.name else file

    run(tmp_path / "whole", 3).fit()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.warns(UserWarning, match=r"tensorboard cannot be written \(OSError: ") as told:
            run(tmp_path / "full", 3).fit()
    assert len(told) == 1
    texts = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "full")]
    assert texts[0] == texts[1]
    assert (tmp_path / "full" / "summary.json").exists()
    whole = read_scalars(tmp_path / "whole")
    assert read_scalars(tmp_path / "full") == (
        {tag: points[:1] for tag, points in whole.items()} if left else {}
    )
    run(tmp_path / "full", 3).fit(resume=True)
    assert read_scalars(tmp_path / "full") == whole


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run, and no folder."""
    run(tmp_path / "with", 2).fit()
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    run(tmp_path / "without", 2).fit()
    assert not (tmp_path / "without" / TENSORBOARD).exists()
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("with", "without")]
    assert metrics[0] == metrics[1]


def test_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with scalar_writer(None, []) as write:
        write(ROW)
    assert list(tmp_path.iterdir()) == []
