"""`l0fast.Trainer` and the command on two processes: the training of one, resumed bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from l0fast import Trainer, TrainerSettings, frontier
from l0fast.data import sets
from l0fast.data.sets import Data, Split
from l0fast.training.folder import METRICS, SUMMARY
from l0fast.training.frontier import FRONTIER
from tests import ROOT
from tests.helpers.command import run
from tests.helpers.processes import run_processes
from tests.helpers.same_run import Stop, assert_same, assert_same_run, state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SETTINGS: dict[str, Any] = {
    "density": 0.5, "epochs": 3, "batch_size": 55, "lr": 5e-3, "gate_lr": 0.05, "dual_lr": 0.1,
    "skip": False,
}  # fmt: skip


class Normed(nn.Module):
    """With a batch norm, whose statistics are each process's own, and a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 24)
        self.norm = nn.BatchNorm1d(24)
        self.fc2 = nn.Linear(24, 16)
        self.fc3 = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.fc1(x.flatten(1))))
        return self.fc3(nn.functional.dropout(torch.relu(self.fc2(x)), 0.1, self.training))


def plain() -> nn.Module:
    hidden = [nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 10))


def few() -> Data:
    """Four batches of an odd size, and one of a single example."""
    whole = sets.load("digits")
    train = Split(whole.train.inputs[:221], whole.train.targets[:221])
    test = Split(whole.test.inputs[:51], whole.test.targets[:51])
    return Data(train, Split(*(part[:7] for part in whole.test)), test, 10)


def streams(data: Data, workers: int = 0) -> Data:
    """The same in loaders, one of which knows no sampler."""
    train = DataLoader(TensorDataset(*data.train), 55, shuffle=True, num_workers=workers)
    test = DataLoader(TensorDataset(*data.test), 20)
    return Data(train, [(data.validation.inputs, data.validation.targets)], test, 10)


def fit(model: Any, data: Data, out: Path, stop_at: int = 0, **changes: Any) -> None:
    """A run, which goes on where it is, or is stopped after an epoch."""
    torch.manual_seed(0)
    chosen = TrainerSettings(**(SETTINGS | changes))
    one = Trainer(model(), data, chosen, out=out, device="cpu")

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == stop_at:
            raise Stop("stopped")

    try:
        one.fit(resume=True, on_epoch=stop)
    except Stop:
        torch.manual_seed(99)


def targets(folder: Path, stop: bool = False) -> None:
    """Two targets from one run, which goes on where it is, or is stopped in the second."""

    def train(trainer: Trainer) -> Any:
        def on_epoch(row: dict[str, Any]) -> None:
            if stop and trainer.settings.density == 0.5:
                raise Stop("stopped")

        return trainer.fit(on_epoch=on_epoch)

    torch.manual_seed(0)
    chosen: dict[str, Any] = SETTINGS | {"epochs": 2}
    settings = TrainerSettings(**chosen)
    try:
        frontier(plain(), few(), settings, (0.7, 0.5), out=folder, resume=True, train=train)
    except Stop:
        torch.manual_seed(99)


def process(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store", world_size=2, rank=rank)
    folder, data = Path(out), few()
    fit(plain, streams(data), folder / "two")
    every: dict[str, Any] = {"ema": 0.8, "precision": "bf16", "select": "best", "accumulate": 2}
    train = Split(*(part[:204] for part in data.train))
    normed = streams(data._replace(train=train), workers=1)
    for name, stop_at in (("whole", 0), ("again", 1), ("again", 0)):
        fit(Normed, normed, folder / name, stop_at, **every)
    refused: dict[str, dict[str, Any]] = {"file": {"density": None}, "new": {"shrink": 1}}
    for what, changes in refused.items():
        try:
            fit(plain, data, folder / what, **changes)
        except ValueError as error:
            (folder / f"{what}-{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def process_of_targets(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{out}/store", world_size=2, rank=rank)
    targets(Path(out) / "two")
    targets(Path(out) / "again", stop=True)
    targets(Path(out) / "again")
    dist.destroy_process_group()


def test_two_processes_take_the_training_of_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fit(plain, streams(few()), tmp_path / "one")
    run_processes(process, str(tmp_path))
    one, two = (state(tmp_path / number) for number in ("one", "two"))
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-4, atol=1e-5)
    for first, second in zip(one["history"], two["history"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        for name in ("test_error_percent", "validation_error_percent"):
            assert second[name] == pytest.approx(first[name], abs=1e-9)
        assert second["expected_density"] == pytest.approx(first["expected_density"], abs=1e-5)
    assert two["ranks"] == 2
    assert one["epoch"] == two["epoch"] == 3
    assert_same_run(tmp_path / "again", tmp_path / "whole")
    for rank in range(2):
        other, shrunk = ((tmp_path / f"{what}-{rank}.txt").read_text() for what in ("file", "new"))
        assert other.startswith("out: got ")
        assert "expected a folder that can be written" in other
        assert shrunk.startswith("shrink: got 1; expected ")
    with pytest.warns(UserWarning, match=r"^processes: got 1; the run began with 2: its results"):
        fit(plain, streams(few()), tmp_path / "two")


@pytest.mark.exhaustive
def test_two_processes_take_the_targets_of_one(tmp_path: Path) -> None:
    one, two, again = (tmp_path / name for name in ("one", "two", "again"))
    targets(one)
    run_processes(process_of_targets, str(tmp_path))
    last = "density-0.5"
    torch.testing.assert_close(
        state(two / last)["model"], state(one / last)["model"], rtol=1e-4, atol=1e-5
    )
    assert_same(state(again / last)["model"], state(two / last)["model"])
    rows = [json.loads((folder / FRONTIER).read_text()) for folder in (one, two)]
    for first, second in zip(*rows, strict=True):
        assert second["architecture"] == first["architecture"]
        assert second["milliseconds"] > 0


@pytest.mark.exhaustive
@pytest.mark.usefixtures("a_folder_of_its_own")
def test_the_command_by_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same model as one process makes; files and words are the first process's alone."""
    words = ["train", "--widths", "16-8", "--epochs", "2", "--device", "cpu", "--density", "0.5"]
    words += ["--threads", "1", "--batch-size", "65", "--augment", "crop", "--quiet"]
    words += ["--compare-dense", "--out"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = [sys.executable, *torchrun, "-m", "l0fast", *words, str(tmp_path / "two")]
    done = subprocess.run(argv, env=environment, check=True, capture_output=True, text=True)
    assert run(*words, str(tmp_path / "one")) == 0
    capsys.readouterr()
    assert done.stdout.count("pruned model") == 1
    one, two = (state(tmp_path / name) for name in ("one", "two"))
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-4)
    summaries = [json.loads((tmp_path / name / SUMMARY).read_text()) for name in ("one", "two")]
    assert summaries[0]["architecture"] == summaries[1]["architecture"]
    assert summaries[1]["feasible"] is True
    dense = [summary["dense_test_error_percent"] for summary in summaries]
    assert dense[1] == pytest.approx(dense[0], abs=1)  # a few of 360 examples
    assert summaries[1]["cuda_graph"] == "several processes average their gradients"
    assert len((tmp_path / "two" / METRICS).read_text().splitlines()) == 2
    assert_same(one["identity"], two["identity"])
