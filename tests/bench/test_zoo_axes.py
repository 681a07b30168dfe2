"""The table of every axis: what is counted, what counts as the same, and its command."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")

from bench.zoo import axes as command
from bench.zoo import axes_row
from bench.zoo.axes_row import OWN, PLAIN, Row
from bench.zoo.families import FAMILIES

GOOD = Row(
    "LLaMA", 0, axes={"depth": (3, 3, 6), "FFN": (5, 6, 9)}, gated=0.5, params=(1000, 2000),
    error=1e-15, cache=True, no_cache=True, folder=PLAIN, folder_error=0.0, seconds=1.0,
    kept={"it stays": ["lm_head"]},
)  # fmt: skip
WRONG: list[dict[str, Any]] = [
    {"error": 1e-8}, {"cache": False}, {"no_cache": False}, {"folder": "refused"},
    {"folder_error": 1e-2}, {"failure": "ValueError: it"},
]  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that was closed the units are gone, and a folder with a whole block less is plain."""
    row = axes_row.measure("LLaMA")
    assert command.same(row)
    assert row.folder == PLAIN
    assert {axis for axis, (gone, *_) in row.axes.items() if gone} == {
        "depth", "hidden", "heads", "FFN",
    }  # fmt: skip
    for gone, closed, number in row.axes.values():
        assert gone == closed < number
    assert row.params[0] < row.params[1]
    # A pruned model of another function is seen.
    own: Any = axes_row._pruned

    def wrong(*given: Any, **options: Any) -> Any:
        model, small = own(*given, **options)
        small.lm_head.weight.data[0] += 1.0
        return model, small

    monkeypatch.setattr(axes_row, "_pruned", wrong)
    assert not command.same(axes_row.measure("LLaMA"))


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_not_the_same(fault: dict[str, Any]) -> None:
    assert command.same(GOOD)
    assert command.same(replace(GOOD, cache=None, no_cache=None, folder=OWN))
    assert not command.same(replace(GOOD, **fault))


def test_the_command_resumes_and_tells_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def answer(module: str, options: list[str], limit: float) -> dict[str, Any]:
        asked.append(options[0])
        if options[0] == "Phi":
            return {"failure": "ValueError: a | b", "last_lines": []}
        return asdict(replace(GOOD, name=options[0]))

    monkeypatch.setattr(command, "row_of", answer)
    monkeypatch.setattr(command.report, "commit", lambda: "abc")
    names = ["LLaMA", "Phi"]
    for expected in (["LLaMA", "Phi"], ["Phi"]):  # what failed is tried again
        asked.clear()
        assert command.main([*names, "--out", str(tmp_path)]) == 1
        assert asked == expected
    assert command.main(["LLaMA", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "axes.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["LLaMA"]
    command.main([*names, "--out", str(tmp_path)])
    text = (tmp_path / "axes.md").read_text(encoding="utf-8")
    assert "| Phi | ValueError: a \\| b |" in text
    assert "| LLaMA | 3/3/6 | - | - | 5/6/9 | - | - | 50% | 1 k of 2 k |" in text
    assert "lm_head: it stays" in text


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["LaMDA"])
    assert "family: got 'LaMDA'; expected one of BERT" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["BERT", "Falcon (new)", "T5", "Whisper", "ViT"])
def test_fresh_inputs_differ_in_size(name: str) -> None:
    family = FAMILIES[name]
    one, other = family.batch(2, 12), family.batch(3, 17)
    assert one.keys() == other.keys()
    assert all(len(tensor) == 2 for tensor in one.values())
    assert all(len(tensor) == 3 for tensor in other.values())
