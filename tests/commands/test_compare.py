"""`l0fast compare`: every method on the same data and seeds, once, in one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import LATENCY, SUMMARY
from tests.helpers.command import refused, run
from tests.helpers.tables import small_mlp_table

pytestmark = pytest.mark.usefixtures("a_folder_of_its_own")


SHORT = ["compare", "--widths", "12-8", "--epochs", "1", "--device", "cpu", "--threads", "1"]
SHORT += ["--quiet", "--out", "c"]


def test_one_table_of_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--density", "0.5", "--penalty", "0.3", "--measure", "params", "--seeds", "3,4"]
    assert run(*SHORT, *words) == 0
    said = capsys.readouterr().out
    numbers = json.loads(Path("c/compare.json").read_text())
    rows = {row["name"]: row for row in numbers["rows"]}
    methods = ["dense", "magnitude", "magnitude-one-shot", "constrained", "penalised"]
    assert list(rows) == methods
    for name, row in rows.items():
        assert row["seeds"] == 2
        assert f"| {name} |" in Path("c/compare.md").read_text()
        assert any(line.startswith(name) for line in said.splitlines())
        summaries = [json.loads(Path(f"c/{name}-seed-{s}", SUMMARY).read_text()) for s in (3, 4)]
        assert [one["seed"] for one in summaries] == [3, 4]
        errors = [one["test_error_percent"] for one in summaries]
        assert row["test_error_percent"] == pytest.approx(sum(errors) / 2)
        held = name in ("magnitude", "magnitude-one-shot", "constrained")
        assert row["within"] == (2 if held else None)
        if held:
            assert all(one["params_fraction"] <= 0.5 for one in summaries)
    assert rows["dense"]["params"] == 1
    before = {p: p.read_bytes() for p in Path("c").glob(f"*/{CHECKPOINT}")}
    assert run(*SHORT, *words) == 0
    assert " of 10: " not in capsys.readouterr().out
    assert {p: p.read_bytes() for p in Path("c").glob(f"*/{CHECKPOINT}")} == before


def test_other_words_are_other_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder whose runs are of another target is refused, not taken for done."""
    words = ["--methods", "constrained", "--seeds", "0"]
    assert run(*SHORT, *words, "--density", "0.5") == 0
    assert run(*SHORT, *words, "--density", "0.4") == 2
    assert "density: got 0.4; expected 0.5, as in the checkpoint" in capsys.readouterr().err


def test_what_belongs_to_a_target_is_none_of_the_dense_runs() -> None:
    words = ["--seeds", "0", "--density", "0.5", "--shrink", "1"]
    assert run(*SHORT, *words, "--methods", "dense,constrained") == 0
    shrink = {
        name: json.loads(Path(f"c/{name}-seed-0", SUMMARY).read_text())["settings"]["shrink"]
        for name in ("dense", "constrained")
    }
    assert shrink == {"dense": None, "constrained": 1}


def test_a_latency_table_is_none_of_what_has_no_target() -> None:
    small_mlp_table((1, 1, 1)).save("t.json")
    words = ["--widths", "32-16", "--density", "0.5", "--measure", "latency", "--penalty", "0.1"]
    words += ["--latency-table", "t.json", "--methods", "dense,penalised,constrained"]
    assert run(*SHORT, *words, "--seeds", "0") == 0
    table = json.loads(Path("c/constrained-seed-0", LATENCY).read_text())
    assert table == small_mlp_table((1, 1, 1)).as_json()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--density", "0.5", "--latency-table", "t.json"),
            "latency_table: got 't.json'; expected --measure latency beside it",
        ),
        (("--methods", "x"), "methods: got 'x'; expected one of 'dense', 'penalised'"),
        (("--methods", "dense,dense"), "methods: got 'dense,dense'; expected each method once"),
        (("--methods", "penalised"), "penalty: got None; expected a --penalty and penalised"),
        (("--methods", "dense", "--penalty", "1"), "penalty: got '1'; expected a --penalty and"),
        ((), "density: got None; expected --density"),
        (("--density", "2"), "density: got 2.0; expected a density in (0, 1]"),
        (("--density", "0.5", "--dense"), "dense: got True; expected --methods dense"),
        (
            ("--density", "0.5", "--method", "magnitude"),
            "method: got 'magnitude'; expected --methods magnitude",
        ),
        (("--layer-density", "0.5"), "layer_density: got '0.5'; expected NAME=DENSITY"),
        (
            ("--density", "0.5", "--only", "x"),
            "only: got 'x'; expected a pattern that matches a run",
        ),
        (("--density", "0.5", "--seeds", ""), "seeds: got ''; expected seeds such as"),
    ],
)
def test_bad_words(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *SHORT, *arguments)
