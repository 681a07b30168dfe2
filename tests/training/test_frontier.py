"""Several targets from one run: a model for each, and an interruption changes nothing."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from l0fast import Trainer, frontier, load_pruned, sparsify_
from l0fast.data.sets import Data
from l0fast.layers.handle import gated_layers
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import PRUNED, SUMMARY
from l0fast.training.frontier import FRONTIER, PLOT, format_frontier
from tests.helpers.runs import evaluate, quick, small_mlp
from tests.helpers.same_run import Stop, assert_same_run
from tests.helpers.thinned import thinned

pytestmark = pytest.mark.usefixtures("one_thread")


TARGETS = (0.7, 0.5, 0.3)


def run(digits: Data, out: Path | None, **options: Any) -> list[dict[str, Any]]:
    identity = {"dataset": "digits", "model": "mlp"}
    settings = quick(epochs=3, **options.pop("settings", {}))
    if not options.get("resume"):  # the test's own generators differ from the fixture's
        random.seed(0)
        np.random.seed(0)
    return frontier(
        small_mlp(), digits, settings, TARGETS, out=out, identity=identity, device="cpu", **options
    )


@pytest.fixture(scope="module")
def undisturbed(
    digits: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of an uninterrupted frontier, to be read only, and its rows."""
    out = tmp_path_factory.mktemp("undisturbed") / "f"
    torch.manual_seed(0)
    return out, run(digits, out)


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
    # Unsettled: else see test_settle.
    chosen: dict[str, Any] = {"settle": 0, "target_schedule": "cubic", "dual_lr": 2.0}
    run(digits, tmp_path / "f", settings=chosen)
    states = [
        torch.load(tmp_path / "f" / f"density-{target:g}" / CHECKPOINT, weights_only=True)
        for target in TARGETS
    ]
    # Adam counts the steps of all targets; the runs their own.
    steps = [state["optimizer"]["state"][0]["step"].item() for state in states]
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0]]
    assert [state["step"] for state in states] == [steps[0]] * 3
    # The second by hand: the model, moments and noise of the first's end, and a new multiplier.
    chosen["density"] = TARGETS[0]
    first = Trainer(small_mlp(), digits, quick(epochs=3, **chosen), device="cpu")
    first.fit()
    end = first.checkpoint()
    second = Trainer(small_mlp(), digits, replace(first.settings, density=TARGETS[1]), device="cpu")
    torch.manual_seed(99)
    second.open(start_from=end)
    second.fit()
    for name, value in second.model.state_dict().items():
        assert torch.equal(value, states[1]["model"][name]), name
    assert second.history[0]["lambda"] == states[1]["history"][0]["lambda"]
    # The second target comes down from where the first has left the model.
    left = second.history[0]["aim"]["model"], first.history[-1]["density"]["model"]
    assert TARGETS[1] < left[0] < left[1] < 0.8


@pytest.mark.parametrize("stop", thinned([((0.5, 1),), ((0.7, 2),), ((0.3, 2),), ((0.5, 3),)], 4))
def test_an_interruption_changes_nothing(
    digits: Data, tmp_path: Path, stop: tuple[float, int], undisturbed: Any
) -> None:
    whole, wanted = undisturbed

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
        assert_same_run(tmp_path / "out" / name, whole / name)


def test_without_a_folder(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = run(digits, None)
    assert list(tmp_path.iterdir()) == []
    folder, with_folder = undisturbed
    assert [r["test_error_percent"] for r in rows] == [r["test_error_percent"] for r in with_folder]
    assert (folder / "density-0.3" / SUMMARY).exists()


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        ((), {}, ValueError, "targets: got []; expected targets that fall"),
        ((0.5, 0.5), {}, ValueError, "targets: got [0.5, 0.5]; expected targets that fall"),
        ((0.3, 0.5), {}, ValueError, "targets: got [0.3, 0.5]; expected targets that fall"),
        ((0.5, 0), {}, ValueError, "targets[1]: got 0; expected a density in (0, 1]"),
        (("a",), {}, ValueError, "targets[0]: got 'a'; expected a density in (0, 1], or an amount"),
        ((0.5, "1 MB"), {}, ValueError, "targets[1]: got '1 MB'; expected a density in (0, 1], or"),
        ((0.5, 0.001), {}, ValueError, "targets[1]: got 0.001; expected a density in [0.0"),
        ((0.5, "9 gates"), {}, ValueError, "targets[1]: got '9 gates'; expected an amount from"),
        ((0.3, "2k gates"), {}, ValueError, "targets: got [0.3, '2k gates']; expected targets"),
        (0.5, {}, TypeError, "targets: got 0.5; expected targets that fall"),
        ("0.5", {}, TypeError, "targets: got '0.5'; expected targets that fall"),
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
    model = small_mlp()
    with pytest.raises(error) as caught:
        frontier(model, digits, quick(**options), targets, out=tmp_path / "f")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "f").exists()
    assert not gated_layers(model)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first(
    digits: Data, tmp_path: Path
) -> None:
    (tmp_path / "density-0.5").write_text("precious")
    model = small_mlp()
    with pytest.raises(ValueError, match=r"^out: got .*density-0\.5'; expected a folder that can"):
        frontier(model, digits, quick(), (0.7, 0.5), out=tmp_path, resume=True)
    assert not gated_layers(model)
    assert [path.name for path in tmp_path.iterdir()] == ["density-0.5"]


def test_amounts_and_densities_each_in_a_folder_of_its_own(digits: Data, tmp_path: Path) -> None:
    targets = ("2k params", 0.5000001, 0.5, "1.1k params")
    settings = quick(epochs=1, measure="params", density=1.0)
    rows = frontier(small_mlp(), digits, settings, targets, out=tmp_path, device="cpu")
    assert [row["target_density"] for row in rows] == list(targets)
    assert rows[0]["params"] <= 2000
    assert rows[3]["params"] <= 1100
    assert {path.name for path in tmp_path.glob("density-*")} == {
        "density-2k-params", "density-0.5000001", "density-0.5", "density-1.1k-params",
    }  # fmt: skip
    lines = format_frontier(rows).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[1:]] == [
        "2k params", "0.5", "0.5", "1.1k params",
    ]  # fmt: skip


def test_the_dense_model_that_is_timed_has_no_gates(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Any] = []

    def seconds(models: list[Any], *_: Any) -> list[float]:
        timed.extend(models)
        return [1.0] * len(models)

    monkeypatch.setattr(sys.modules[frontier.__module__], "whole_seconds", seconds)
    model = small_mlp()
    wanted = model(digits.test.inputs)
    sparsify_(model, example_inputs=digits.test.inputs[:1])
    frontier(model, digits, quick(epochs=1), (0.7, 0.5), device="cpu")
    dense, *small = timed
    assert len(small) == 2
    assert not any(gated_layers(each) for each in timed)
    torch.testing.assert_close(dense(digits.test.inputs), wanted)  # of before the training


def test_a_folder_with_a_run_of_any_target_is_refused(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "density-0.3").mkdir()
    with pytest.raises(
        ValueError, match=r"^out: got .*density-0\.3'; expected a folder that does not"
    ):
        run(digits, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["density-0.3"]
