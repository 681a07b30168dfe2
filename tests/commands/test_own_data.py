"""The command on data of the user's own: tables, and photographs in folders that are streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from l0fast import load_pruned
from l0fast.commands import progress, runs, values
from l0fast.data import sets
from l0fast.data.imagefolder import Loading
from l0fast.training import models
from l0fast.training.folder import PRUNED, SUMMARY
from tests.helpers.command import refused, run
from tests.helpers.images import tiny_imagefolder
from tests.helpers.same_run import Stop, assert_same_run

pytestmark = pytest.mark.usefixtures("one_thread", "a_folder_of_its_own")

FAST = ["--batch-size", "16", "--gate-lr", "0.05", "--device", "cpu", "--quiet", "--seed", "1"]


def photographs(root: Path, side: int = 50) -> None:
    """Pieces of the two photographs of scikit-learn, a class each, as JPEG."""
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):  # type: ignore[attr-defined]
        (root / name).mkdir(parents=True)
        for row in range(0, 400 - side, side):
            for column in range(0, 600 - side, side):
                piece = Image.fromarray(photo[row : row + side, column : column + side])
                piece.save(root / name / f"{row}-{column}.jpg")


def stopped_after(monkeypatch: pytest.MonkeyPatch, epoch: int, *arguments: str) -> None:
    """Runs the command until an epoch is saved, and ends it there as if it were killed."""
    run_trainer = progress.run

    def until(trainer: Any, quiet: bool) -> Any:
        def stop(row: dict[str, Any]) -> None:
            if row["epoch"] == epoch:
                raise Stop("stopped")

        return trainer.fit(on_epoch=stop)

    monkeypatch.setattr("l0fast.commands.training.run", until)
    monkeypatch.setenv("L0FAST_TRACEBACK", "1")
    with pytest.raises(Stop, match="stopped"):
        run(*arguments)
    monkeypatch.delenv("L0FAST_TRACEBACK")
    monkeypatch.setattr("l0fast.commands.training.run", run_trainer)


def test_photographs_are_streamed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained in bf16, killed, resumed bit for bit, pruned again from the checkpoint."""
    photographs(Path("photos"))
    words = ["train", "--dataset", "photos", "--model", "lenet5", "--widths", "6-8-16", *FAST]
    words += ["--image-size", "16", "--augment", "resized-crop-flip", "--workers", "1"]
    words += ["--density", "0.5", "--measure", "macs", "--epochs", "4", "--lr", "0.01"]
    words += ["--precision", "bf16", "--ema", "0.7", "--warmup", "0.5", "--accumulate", "2"]
    assert run(*words, "--out", "whole") == 0
    stopped_after(monkeypatch, 2, *words, "--out", "again")
    torch.manual_seed(99)
    assert run(*words, "--out", "again", "--resume") == 0
    assert_same_run(Path("again"), Path("whole"))
    summary = json.loads(Path("whole", SUMMARY).read_text())
    wanted = {"dataset": "imagefolder", "in_shape": [3, 16, 16], "num_classes": 2}
    assert summary["settings"]["precision"] == "bf16"
    assert summary.items() >= (wanted | {"image_augment": "resized-crop-flip"}).items()
    assert summary["feasible"] is True
    assert summary["test_error_percent"] < 30
    test = sets.load("imagefolder", "photos", loading=Loading(image_size=16)).test
    small = load_pruned(
        lambda: models.build("lenet5", (3, 16, 16), 2, (6, 8, 16)), f"whole/{PRUNED}"
    ).eval()
    with torch.no_grad():
        wrong = sum(int((small(x).argmax(1) != y).sum()) for x, y in test)
    assert summary["test_error_percent"] == 100 * wrong / len(test.dataset)
    assert run("prune", "whole/checkpoint.pt", "--out", "again.safetensors") == 0
    capsys.readouterr()
    message = refused(capsys, *words, "--out", "whole", "--resume", "--augment", "crop")
    assert "image_augment: got 'crop'; expected 'resized-crop-flip', as in the ch" in message
    size = Path("photos/flower/0-0.jpg").stat().st_size
    Path("photos/flower/0-0.jpg").write_bytes(Path("photos/flower/0-50.jpg").read_bytes())
    assert Path("photos/flower/0-0.jpg").stat().st_size != size
    assert "digest: got" in refused(capsys, *words, "--out", "whole", "--resume")
    # What is damaged is named, though a worker has read it, and nothing is lost.
    Path("photos/flower/0-0.jpg").write_bytes(b"\xff\xd8\xff")
    assert run(*words, "--out", "third") == 2
    assert "data_root: got 'photos/flower/0-0.jpg'; expected an image" in capsys.readouterr().err


def test_a_table_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """A regression: its metric in every file, table and line; compared, pruned, reported."""
    bunch: Any = load_digits()
    inputs = (bunch.data / 16).astype(np.float32)
    np.savez("table.npz", inputs=inputs[:600], targets=inputs[:600, 10:20].sum(1))
    words = ["--dataset", "table.npz", "--widths", "24-12", "--epochs", "2", *FAST]
    words += ["--density", "0.5"]
    compared = [word for word in words if word not in ("--seed", "1")]
    compared += ["--seeds", "1", "--methods", "dense,constrained", "--out", "c"]
    assert run("compare", *compared) == 0
    assert "test squared error" in capsys.readouterr().out
    table = json.loads(Path("c/compare.json").read_text())
    assert all(row["metric"] == "squared_error" for row in table["rows"])
    assert run("train", *words, "--out", "x") == 0
    assert ": test squared error " in capsys.readouterr().out
    summary = json.loads(Path("x", SUMMARY).read_text())
    assert summary["settings"]["task"] == "regression"
    assert summary["in_shape"] == [64]
    named = {"dataset": "table.npz", "widths": "24-12", "epochs": "2", "density": "0.5"}
    asked = runs.words(**named, batch_size="16", gate_lr="0.05", seed="1")
    assert runs.Run("row", asked).is_of(summary)
    assert run("train", *words, "--density", "0.6,0.4", "--out", "f") == 0
    assert "test squared error" in capsys.readouterr().out
    assert run("report", "x/checkpoint.pt") == 0
    assert run("prune", "x/checkpoint.pt", "--out", "small.safetensors") == 0
    small = load_pruned(lambda: models.build("mlp", (64,), 1, (24, 12)), "small.safetensors")
    test = sets.load("arrays", "table.npz").test
    with torch.no_grad():
        error = float((small.eval()(test.inputs) - test.targets).square().mean())
    assert summary["test_squared_error"] == pytest.approx(error, rel=1e-4)
    np.savez("table.npz", inputs=inputs[:600], targets=inputs[:600, 20:30].sum(1))
    assert not runs.Run("row", asked).is_of(summary)
    capsys.readouterr()
    assert run("train", *words, "--out", "x", "--resume") == 2  # other targets of the same shape
    assert "digest: got" in capsys.readouterr().err


def test_a_validation_of_its_own_is_no_share_of_the_training() -> None:
    tiny_imagefolder(Path("images"), "test")
    args = runs.words(dataset="images")
    assert values.validation_fraction(args) == 1 / 12
    (Path("images") / "val").mkdir()
    assert values.validation_fraction(args) == 0
    args.validation_fraction = "0.5"
    assert values.validation_fraction(args) == 0.5


def test_bad_words(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    for words, message in (
        (("--dataset", "no.csv"), "dataset: got 'no.csv'; expected one of 'digits', 'mnist'"),
        (("--dataset", "no.npz"), "dataset: got 'no.npz'; expected a file .npz or .pt"),
        (("--dataset", "folder"), "data_root: got 'folder'; expected a folder with train/"),
        (
            ("--dataset", "folder", "--data-root", "x"),
            "data_root: got 'x'; expected no --data-root",
        ),
        (("--workers", "2"), "workers: got 2; expected none: digits is in memory"),
        (("--task", "regression"), "task: got 'regression'; expected 'classification', as the t"),
        (("--task", "sorting"), "task: got 'sorting'; expected one of 'classification'"),
        (("--augment", "resized-crop-flip"), "augment: got 'resized-crop-flip'; expected one of"),
    ):
        assert message in refused(capsys, "train", "--density", "0.5", *words)
