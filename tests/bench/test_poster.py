"""`python -m bench.poster`: what it plans, skips, writes and draws; short, on digits."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from bench import environment
from bench.poster import earlier
from bench.poster.__main__ import main
from bench.poster.plan import plan
from bench.poster.plot import plot_poster
from l0fast.commands import runs
from l0fast.training import models
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import METRICS, SUMMARY
from tests import ROOT
from tests.helpers import command
from tests.helpers.histories import history

pytestmark = pytest.mark.usefixtures("a_folder_of_its_own")

RESULTS = ROOT / "bench" / "results" / "mnist"
SHORT = ["--dataset", "digits", "--epochs", "1", "--device", "cpu", "--threads", "1"]
SHORT += ["--quiet", "--out", "p"]


def run(*arguments: str) -> int:
    """The exit code of the command."""
    return command.run(*arguments, main=main)


@pytest.fixture(autouse=True)
def small_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths of the paper would take long."""
    monkeypatch.setattr(models, "WIDTHS", {"mlp": (24, 16), "lenet5": (8, 12, 24)})


def test_the_plan_is_that_of_the_paper() -> None:
    every = plan([0, 1, 2, 3, 4], {"dataset": "mnist", "epochs": 200})
    assert len({one.name for one in every}) == len(every) == 5 * (4 * 2 + 2 + 4)
    asked = {one.row: (one.args.density, one.args.penalty, one.args.measure) for one in every}
    assert asked["mlp-constrained-published"] == ("0.33", None, "gates")
    assert asked["lenet5-constrained-default"] == ("0.1", None, "gates")
    assert asked["mlp-penalised-default"] == (None, "0.1", "gates")
    assert asked["lenet5-params-default"] == ("0.0775", None, "params")
    assert asked["lenet5-macs-default"] == ("0.465", None, "macs")
    assert asked["lenet5-few-macs-default"] == ("0.155", None, "macs")
    assert {one.row for one in every if one.args.augment == "crop"} == {
        "mlp-constrained-augmented",
        "lenet5-constrained-augmented",
    }
    assert all(one.args.penalty_per_example for one in every if one.args.penalty)


def test_runs_that_were_trained_before_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed summaries, by what they say of themselves; those of other epochs are not."""
    monkeypatch.undo()
    shared = {"dataset": "mnist", "epochs": 200}
    every = plan(range(5), shared)
    done = earlier.finished(every, Path("none"), earlier.summaries_in([str(RESULTS)]))
    kinds = ("constrained", "penalised")
    assert done.keys() >= {f"mlp-{kind}-published-seed-{s}" for kind in kinds for s in range(5)}
    # Those of this project's recipe had no start with all gates open.
    assert not any("default" in name for name in done)
    # Of an earlier default of what a penalised run has no use for.
    assert done["mlp-penalised-published-seed-0"]["settings"]["target_schedule"] == "auto"
    for name, summary in done.items():
        shifted = summary["settings"].get("augment", "none") != "none"
        recipe = "augmented" if shifted else summary["recipe"]
        assert name.endswith(f"{recipe}-seed-{summary['seed']}")
        assert name.startswith(summary["model"])
    other = plan(range(5), shared | {"epochs": 100})
    assert earlier.finished(other, Path("none"), earlier.summaries_in([str(RESULTS)])) == {}


@pytest.mark.exhaustive
def test_all_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SHORT, "--seeds", "0") == 0
    said = capsys.readouterr().out
    assert "14 of 14 runs are done" in said
    numbers = json.loads(Path("p/poster.json").read_text())
    assert len(numbers["runs"]) == 14
    assert numbers["missing"] == []
    text = Path("p/poster.md").read_text()
    for row in numbers["tables"]["The published table"] + numbers["tables"]["By size"]:
        assert f"| {row['name']} |" in text
    ours = [row for row in numbers["tables"]["By size"] if "recipe" in row["name"]]
    assert [row["within"] for row in ours] == [1, 1, 1, 1]
    with Image.open("p/poster.png") as image:
        assert image.size[0] > 800
    # Nothing is trained twice.
    before = {p: p.read_bytes() for p in Path("p").glob(f"*/{CHECKPOINT}")}
    assert run(*SHORT, "--seeds", "0") == 0
    assert " of 14: " not in capsys.readouterr().out
    assert {p: p.read_bytes() for p in Path("p").glob(f"*/{CHECKPOINT}")} == before


def test_only_some_and_interrupted_ones_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "mlp-c*-default-seed-1,lenet5-macs-*-seed-0"]
    assert run(*SHORT, "--seeds", "0-1", *only) == 0
    folders = {path.name for path in Path("p").iterdir() if path.is_dir()}
    assert folders == {"mlp-constrained-default-seed-1", "lenet5-macs-default-seed-0"}
    assert "Missing: mlp-penalised-published-seed-0" in Path("p/poster.md").read_text()
    one = Path("p/mlp-constrained-default-seed-1")
    summary = json.loads((one / SUMMARY).read_text())
    (one / SUMMARY).unlink()
    capsys.readouterr()
    assert run(*SHORT, "--seeds", "0-1", *only) == 0
    assert "mlp-constrained-default-seed-1" in capsys.readouterr().out
    again = json.loads((one / SUMMARY).read_text())
    assert again == summary
    assert len((one / METRICS).read_text().splitlines()) == 1


def test_done_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "mlp-constrained-default-seed-0"]
    assert run(*SHORT, *only) == 0
    Path("p").rename("earlier")
    assert run(*SHORT, *only, "--have", "earlier", "--list") == 0
    assert "done   mlp-constrained-default-seed-0" in capsys.readouterr().out
    assert not Path("p/mlp-constrained-default-seed-0").exists()
    numbers: Any = json.loads(Path("p/poster.json").read_text())
    assert list(numbers["runs"]) == ["mlp-constrained-default-seed-0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("poster",), "unrecognized arguments: poster"),
        (
            (*SHORT, "--only", "x*"),
            "only: got 'x*'; expected a pattern that matches a run:",
        ),
        ((*SHORT, "--seeds", "0-x"), "seeds: got '0-x'; expected seeds such as 0-4 or 0,1,2"),
        ((*SHORT, "--seeds", "4-0"), "seeds: got '4-0'; expected seeds such as"),
        ((*SHORT, "--seeds", "1,1"), "seeds: got '1,1'; expected seeds such as"),
        ((*SHORT, "--epochs", "0"), "epochs: got 0; expected a whole number >= 1"),
        ((*SHORT, "--have", "no"), "have: got 'no'; expected a folder with summaries of runs"),
        ((*SHORT, "--skip", "no"), "skip: got 'no'; expected one of 'auto', 'on', 'off'"),
        ((*SHORT, "--dataset", "no"), "dataset: got 'no'; expected one of 'digits'"),
    ],
)
def test_bad_words(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = command.refused(capsys, *arguments, main=main, name="python -m bench.poster: ")
    assert message in said


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train_all", interrupt)
    assert run(*SHORT, "--seeds", "0") == 130
    assert capsys.readouterr().err == (
        "python -m bench.poster: interrupted; the same command goes on from the last epoch\n"
    )


@pytest.mark.exhaustive
def test_as_a_process(tmp_path: Path) -> None:
    """What a shell sees: nothing but the line, and 2."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.poster", *SHORT, "--seeds", "x"],
        env=environment(1),
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    line = "python -m bench.poster: seeds: got 'x'; expected seeds such as 0-4 or 0,1,2\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
    assert list(tmp_path.iterdir()) == []


def test_the_figure_has_a_colour_for_each_settings_and_counts_their_seeds(
    figures: list[Figure],
) -> None:
    runs = [history(epochs, "model") for epochs in (5, 4, 6)]
    by_settings: list[dict[str, Any]] = [
        {"published": [], "ours": runs, "shifted": runs[:1]},
        {"published": runs[:1], "ours": runs[:2], "shifted": []},
    ]
    histories = {
        ("MLP", "constrained"): by_settings[0],
        ("LeNet", "constrained"): by_settings[1],
        ("LeNet", "penalised"): {"published": [], "ours": [history(4, "penalty")]},
    }
    stream: Any = io.BytesIO()
    plot_poster(histories, dict.fromkeys(histories, 0.3), stream)
    (figure,) = figures
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [
        "constrained, ours (3, 2)",
        "constrained, shifted (1, 0)",
        "target",
        "constrained, published (0, 1)",
        "penalised, ours (0, 1)",
    ]
    columns = np.array(figure.axes, dtype=object).reshape(-1, 2)
    colors = {
        line.get_label(): line.get_color() for axis in columns.flat for line in axis.get_lines()
    }
    assert len(set(colors.values())) == len(colors)
    # Means over the seeds, as far as all of them are.
    (line, *_) = columns[0, 0].get_lines()
    x, y = line.get_data()
    assert list(x) == [1, 2, 3, 4]
    wanted = [sum(rows[i]["expected_density"] for rows in runs) / 3 for i in range(4)]
    assert np.allclose(y, wanted)
