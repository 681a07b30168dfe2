"""Several targets from one run: a model for each, and an interruption changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_resume import Stop, assert_same_run
from test_trainer import digits, evaluate, one_thread, quick, small_mlp

from l0fast import Trainer, frontier, load_pruned
from l0fast.data.sets import Data
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import PRUNED, SUMMARY
from l0fast.training.frontier import FRONTIER, PLOT, format_frontier

__all__ = ["digits", "one_thread"]  # fixtures

TARGETS = (0.7, 0.5, 0.3)


def run(digits: Data, out: Path | None, **options: Any) -> list[dict[str, Any]]:
    identity = {"dataset": "digits", "model": "mlp"}
    settings = quick(epochs=3, **options.pop("settings", {}))
    return frontier(
        small_mlp(), digits, settings, TARGETS, out=out, identity=identity, device="cpu", **options
    )


def test_a_model_for_each_target(digits: Data, tmp_path: Path) -> None:
    rows = run(digits, tmp_path / "f", settings={"density": 1.0, "measure": "params"})
    assert json.loads((tmp_path / "f" / FRONTIER).read_text()) == rows
    assert [row["target_density"] for row in rows] == list(TARGETS)
    sizes = [row["params"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]
    lines = format_frontier(rows).splitlines()
    for row, line in zip(rows, lines[1:], strict=True):
        assert row["feasible"] is True
        assert row["params_fraction"] <= row["target_density"]
        folder = tmp_path / "f" / f"density-{row['target_density']:g}"
        small = load_pruned(small_mlp, folder / PRUNED)
        assert sum(p.numel() for p in small.parameters()) == row["params"]
        assert evaluate(small, digits.test) == row["test_error_percent"]
        assert 0 < row["milliseconds"] < 1000
        assert row["architecture"] in line
        assert f"{row['params']:,}" in line
    with Image.open(tmp_path / "f" / PLOT) as image:
        assert image.size[0] > 800


def test_each_target_goes_on_from_the_one_before(digits: Data, tmp_path: Path) -> None:
    run(digits, tmp_path / "f")
    states = [
        torch.load(tmp_path / "f" / f"density-{target:g}" / CHECKPOINT, weights_only=True)
        for target in TARGETS
    ]
    # Adam counts the steps of all targets; the runs their own.
    steps = [state["optimizer"]["state"][0]["step"].item() for state in states]
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0]]
    assert [state["step"] for state in states] == [steps[0]] * 3
    # The second by hand: the model, moments and noise of the first's end, and a new multiplier.
    first = Trainer(small_mlp(), digits, quick(epochs=3, density=TARGETS[0]), device="cpu")
    first.fit()
    end = first.checkpoint()
    second = Trainer(small_mlp(), digits, replace(first.settings, density=TARGETS[1]), device="cpu")
    torch.manual_seed(99)
    second.open(after=end)
    second.fit()
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert second.history[0]["lambda"] == states[1]["history"][0]["lambda"]


@pytest.mark.parametrize("stop", [(0.7, 2), (0.5, 1), (0.3, 2), (0.5, 3)])
def test_an_interruption_changes_nothing(
    digits: Data, tmp_path: Path, stop: tuple[float, int]
) -> None:
    wanted = run(digits, tmp_path / "undisturbed")

    def train(trainer: Trainer) -> dict[str, Any]:
        def interrupt(row: dict[str, Any]) -> None:
            if (trainer.settings.density, row["epoch"]) == stop:
                raise Stop("stopped")

        return trainer.fit(on_epoch=interrupt)

    with pytest.raises(Stop, match="stopped"):
        run(digits, tmp_path / "out", train=train)
    torch.manual_seed(99)  # another process draws something else
    rows = run(digits, tmp_path / "out", resume=True)
    measured = {"seconds", "milliseconds", "dense_milliseconds"}
    for row, other in zip(rows, wanted, strict=True):
        assert {k: v for k, v in row.items() if k not in measured} == {
            k: v for k, v in other.items() if k not in measured
        }
    for target in TARGETS:
        name = f"density-{target:g}"
        assert_same_run(tmp_path / "out" / name, tmp_path / "undisturbed" / name)


def test_without_a_folder(digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = run(digits, None)
    assert list(tmp_path.iterdir()) == []
    with_folder = run(digits, tmp_path / "f")
    assert [r["test_error_percent"] for r in rows] == [r["test_error_percent"] for r in with_folder]
    assert (tmp_path / "f" / "density-0.3" / SUMMARY).exists()


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        ((), {}, ValueError, "targets: got []; expected densities that fall"),
        ((0.5, 0.5), {}, ValueError, "targets: got [0.5, 0.5]; expected densities that fall"),
        ((0.3, 0.5), {}, ValueError, "targets: got [0.3, 0.5]; expected densities that fall"),
        ((0.5, 0), {}, ValueError, "targets[1]: got 0; expected a density in (0, 1]"),
        (("a",), {}, TypeError, "targets[0]: got 'a'; expected a density in (0, 1]"),
        (0.5, {}, TypeError, "targets: got 0.5; expected densities that fall"),
        ("0.5", {}, TypeError, "targets: got '0.5'; expected densities that fall"),
        ((0.5,), {"penalty": 1}, ValueError, "settings: got 'a penalty or layer_density'"),
    ],
)
def test_bad_targets(
    digits: Data,
    tmp_path: Path,
    targets: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        frontier(small_mlp(), digits, quick(**options), targets, out=tmp_path / "f")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "f").exists()


def test_a_folder_with_a_run_of_any_target_is_refused(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "density-0.3").mkdir()
    with pytest.raises(ValueError, match=r"^out: got .*density-0\.3'; expected no such folder yet"):
        run(digits, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["density-0.3"]
