"""`python -m bench.quality`: every method at one size, and what its table says of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from torch import nn

from bench.quality import __main__ as command
from bench.quality import methods
from bench.quality.methods import DEFAULT, DENSE, SCRATCH, Run, train
from bench.quality.plot import draw
from bench.quality.table import PENALISED_BEST, cells, geometric_mean, markdown, ratios
from bench.quality.tasks import FINE_TUNED, TASKS, Task
from l0fast import Trainer, TrainerSettings
from l0fast.data import sets
from l0fast.data.formats import Split
from l0fast.data.sets import Data

TASK = "MLP, digits"
ABOUT = {"command": "python -m bench.quality", "torch": "2", "cpu": "a CPU"}


def few(*_: Any) -> Data:
    whole = sets.load("digits", None, 0.25, 0)

    def part(split: Split | None) -> Split:
        assert split is not None
        return Split(split.inputs[:96], split.targets[:96])

    return Data(part(whole.train), part(whole.validation), part(whole.test), whole.num_classes)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, TASK, Task("mlp", "digits", (2, 3, 4), 3e-3, 48))
    monkeypatch.setattr(methods, "load", few)
    methods._dense.cache_clear()


def row(method: str, seed: int, test: float, **values: Any) -> dict[str, Any]:
    made = {"task": TASK, "length": "short", "target": 0.2, "method": method, "seed": seed}
    return {**made, "validation": test, "test": test, "collapsed": [], **values}


ROWS = [
    row(DENSE, 0, 1.0, target=1.0),
    row(DEFAULT, 0, 4.0),
    row(DEFAULT, 1, 6.0),
    row("gradual magnitude", 0, 10.0),
    row("gradual magnitude", 1, 10.0, collapsed=["fc1"]),
    row(SCRATCH, 0, 4.0),
    row("penalised L0, 1", 0, 3.0, validation=9.0),
    row("penalised L0, 3", 0, 20.0, validation=8.0),
    {"task": TASK, "length": "short", "target": 0.2, "method": "x", "seed": 0, "error": "refused"},
]


@pytest.mark.usefixtures("one_thread", "short")
@pytest.mark.parametrize("method", [DENSE, DEFAULT, "gradual magnitude", "penalised L0, 3"])
def test_a_method_is_trained_to_its_size(method: str) -> None:
    rows = train(Run(TASK, "short", 0.2, method, 0), None)
    expected = [DEFAULT, SCRATCH] if method == DEFAULT else [method]
    assert [one["method"] for one in rows] == expected
    for one in rows:
        assert one["epochs"] == 2
        assert 0 < one["params"] <= (1 if method == DENSE else 0.2)
        assert 0 <= one["validation"] <= 100
    if method == DEFAULT:
        assert rows[0]["params"] == rows[1]["params"]
        assert rows[0]["validation"] != rows[1]["validation"]


@pytest.mark.usefixtures("one_thread", "short")
def test_a_fine_tuning_starts_from_a_trained_dense_net(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, TASK, Task("mlp", "digits", (2, 3, 4), 3e-3, 48, 1e-4))
    asked: list[tuple[int, float]] = []
    fitted = methods._fitted

    def noted(model: nn.Module, data: Data, settings: TrainerSettings) -> Trainer:
        asked.append((settings.epochs, settings.lr))
        return fitted(model, data, settings)

    monkeypatch.setattr(methods, "_fitted", noted)
    tuned, fresh = train(Run(TASK, "short", 0.5, DEFAULT, 0), None)
    # The dense net first; the small one from scratch has as many epochs in all.
    assert asked == [(3, 3e-3), (2, 1e-4), (5, 3e-3)]
    assert (tuned["epochs"], fresh["epochs"]) == (2, 5)
    start, data = methods._dense(TASK, 0, None)  # as it was: each training has a copy
    assert methods._error(start, data.train) < 40  # of random weights: about 90
    assert len(asked) == 3


def test_the_table_compares_with_the_best_other_method() -> None:
    shown = cells(ROWS)
    place = (TASK, "short", 0.2)
    assert list(shown) == [place]
    assert shown[place][DEFAULT][:2] == (5.0, pytest.approx(1.0))
    assert math.isnan(shown[place][SCRATCH].error)
    assert str(shown[place]["gradual magnitude"]) == "10.0 ± 0.0 (1 x layer closed)"
    assert shown[place][PENALISED_BEST].mean == 20.0  # by validation, not by the test
    assert shown[place][DENSE].mean == 1.0  # which is no rival
    assert ratios(shown)[place].mean == 1.25
    assert ratios(shown, "gradual magnitude")[place][:2] == (0.5, pytest.approx(0.1))
    found = list(ratios(shown, "gradual magnitude").values()) + list(ratios(shown).values())
    assert geometric_mean(found) == pytest.approx(math.sqrt(0.5 * 1.25))


def test_the_page_says_it() -> None:
    page = markdown(ROWS, ABOUT)
    assert "| MLP, digits | short | 20% | 2 | 1.0 | 4.0 |" in page
    assert "5.0 ± 1.0 | 1.25 |" in page
    said = "0.50 over 1 rows, below 1 in 1, above 1.05 by more than its standard error in 0"
    assert f"| short | gradual magnitude | {said} |" in page
    assert "| all |" not in page


def test_the_page_compares_each_kind_of_training() -> None:
    tuned = [one | {"task": TASK + FINE_TUNED} for one in ROWS]
    longer = [one | {"length": "medium", "test": 5.0} for one in ROWS[:4]]
    page = markdown([*ROWS, *tuned, *longer], ABOUT)
    end = ", below 1 in 1, above 1.05 by more than its standard error in 0 |"
    assert f"| short, fine-tuned | gradual magnitude | 0.50 over 1 rows{end}" in page
    assert "| medium | gradual magnitude | 1.00 over 1 rows, below 1 in 0," in page
    assert "| all | gradual magnitude | 0.63 over 3 rows, below 1 in 2," in page


def test_a_method_has_one_colour_in_all_panels(figures: list[Figure], tmp_path: Path) -> None:
    """Also where the rows of a place come in another order."""
    task = TASK + FINE_TUNED
    other = [one | {"task": task} for one in reversed(ROWS)]
    other.append(row("one-shot magnitude", 0, 5.0) | {"task": task})  # in the second panel alone
    draw(cells([*ROWS, *other]), tmp_path / "quality.png")
    seen: dict[str, set[str]] = {}
    for axis in figures[0].axes:
        for line in axis.get_lines():
            seen.setdefault(str(line.get_label()), set()).add(str(line.get_color()))
    methods = {DENSE, DEFAULT, SCRATCH, "gradual magnitude", "one-shot magnitude", PENALISED_BEST}
    assert set(seen) == methods
    assert {text.get_text() for text in figures[0].legends[0].get_texts()} == methods
    assert all(len(colours) == 1 for colours in seen.values())
    assert len(set.union(*seen.values())) == len(seen)


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Run] = []

    def stand(run: Run, _root: str | None) -> list[dict[str, Any]]:
        trained.append(run)
        if run.method == "one-shot magnitude":
            raise ValueError("target: got 0.2; expected more")
        return [row(run.method, run.seed, 5.0, target=run.target)]

    monkeypatch.setattr(command, "train", stand)
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(row(DEFAULT, 0, 5.0)) + "\n", encoding="utf-8")
    words = ["--seeds", "1", "--tasks", TASK, "--targets", "0.2", "--out", str(tmp_path)]
    words += ["--methods", DENSE, DEFAULT, "gradual magnitude", "one-shot magnitude"]
    command.main(words)
    assert [run.method for run in trained] == [DENSE, "gradual magnitude", "one-shot magnitude"]
    assert command.read(path)[-1]["error"] == "target: got 0.2; expected more"
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")  # killed in a line
    assert len(command.read(path)) == 3
    command.main(words)
    assert trained[3:] == [trained[2]]
    assert len(command.read(path)) == 4
    assert (tmp_path / "quality.md").exists()
    assert (tmp_path / "quality.png").exists()
