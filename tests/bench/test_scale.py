"""`python -m bench.scale`: what it measures, its budgets, its table and its command."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0fast
from bench.scale import __main__ as command
from bench.scale import memory
from bench.scale.counts import counting
from bench.scale.measure import CLOSED, OPEN, STEPS, Row, Step, close_half, dense_model, measure
from bench.scale.models import MODELS, Entry
from bench.scale.plot import plot
from bench.scale.table import as_json, markdown, over_budget
from tests.helpers.thinned import telling, thinned

GIB = 2**30
ABOUT: dict[str, Any] = {
    "command": "python -m bench.scale", "commit": "c", "date": "d", "torch": "t", "cpu": "p",
    "threads": 2, "cores": 4, "load_at_start": 0.25,
}  # fmt: skip


class Bottle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.norm(self.first(x))))
        return self.head(x.relu().mean((2, 3)))


SMALL = {
    "params": Entry("", 101, Bottle, lambda: torch.randn(4, 6), "params"),
    "macs": Entry("", 706, Images, lambda: torch.randn(2, 3, 8, 8), "macs"),
}


def whole_row(name: str = "torchvision/resnet50", seconds: float = 2.0) -> Row:
    """A row within all budgets, with a dense model of half a GiB."""
    steps = [Step(step, seconds, 1.5, GIB, 2 * GIB, 0, 0) for step in STEPS]
    steps[0] = replace(steps[0], exports=1, copies=2)
    return Row(name, 1000, GIB // 2, 0.5, True, steps, 450, 2e-16)


@pytest.mark.parametrize("name", thinned(SMALL, 2))
def test_each_step_of_a_small_model_is_measured(name: str) -> None:
    seen, row = [], whole_row()
    for row in measure(name, SMALL[name]):
        seen.append(len(row.steps))
    assert seen == [1, 2, 3]
    assert [step.name for step in row.steps] == list(STEPS)
    assert (row.params, row.failure) == (SMALL[name].params, "")
    assert row.dense >= 4 * row.params
    assert 0 < row.after < row.params
    assert row.error is not None
    assert row.error <= 1e-10
    for step in row.steps:
        assert step.seconds > 0
        assert 0 < step.before <= step.peak


@pytest.mark.parametrize("name", telling(SMALL, ["macs"]))
def test_a_model_is_exported_once_and_copied_twice_at_most(name: str) -> None:
    *_, row = measure(name, SMALL[name])
    assert sum(step.exports for step in row.steps) == 1
    assert sum(step.copies for step in row.steps) <= 2


def test_no_tensor_is_left_as_initialisation_filled_it() -> None:
    """ViT's head starts as zeros: whatever is pruned, its output would be the same."""
    pytest.importorskip("torchvision")
    model: Any = dense_model(MODELS["torchvision/vit_b_16"])
    assert model.heads.head.weight.std() > 0
    assert all(p.numel() == 1 or p.min() < p.max() for p in model.parameters())


def test_half_of_the_gates_are_closed_in_a_fixed_order() -> None:
    torch.manual_seed(0)
    model = l0fast.sparsify_(Bottle(), gates="input")
    close_half(model)
    gates = {n: p for n, p in model.named_parameters() if n.endswith("log_alpha")}
    assert len(gates) == 2
    for log_alpha in gates.values():
        expected = torch.linspace(*OPEN, len(log_alpha))
        expected[1::2] = CLOSED
        torch.testing.assert_close(log_alpha.detach(), expected, rtol=0.0, atol=0.0)


def test_copies_are_counted_however_they_are_made() -> None:
    model, x = Bottle(), torch.randn(2, 6)
    with counting(model) as work:
        model(x)
        copy.deepcopy(model.first)
    assert (work.exports, work.copies) == (0, 0)
    with counting(model) as work:
        copy.deepcopy(model)
        copy.deepcopy(model, {id(p): p for p in model.parameters()})
        copy.copy(model)
        pickle.dumps(model)
    assert work.copies == 4
    by_hand = object.__new__(Bottle)
    by_hand.__dict__.update(vars(model))
    with counting(model) as work:
        by_hand(x)
        by_hand(x)
    assert work.copies == 1
    with counting(model) as work:
        torch.export.export(model, (x,), strict=False)
    assert (work.exports, work.copies) == (1, 0)
    assert "__call__" not in vars(Bottle)


def test_memory_that_is_free_is_given_back() -> None:
    memory.give_back()
    before = memory.resident()
    if before is None or sys.platform != "linux":
        pytest.skip("this system does not tell the memory of a process")
    blocks = [bytearray(b"1" * 2**16) for _ in range(1600)]
    assert (memory.resident() or 0) >= before + 80 * 2**20
    blocks = blocks[::10]  # those that stay keep the heap from shrinking by itself
    memory.give_back()
    assert (memory.resident() or 0) <= before + 30 * 2**20
    assert len(blocks) == 160


def test_a_peak_is_forgotten() -> None:
    if not memory.forget_peak():
        pytest.skip("this system does not reset peaks")
    size = 200 * 2**20
    before = memory.peak()
    torch.ones(size // 4)
    assert memory.peak() >= before + 0.9 * size
    memory.forget_peak()
    assert memory.peak() <= before + 0.5 * size


@pytest.mark.parametrize("name", MODELS)
def test_models_have_the_parameters_that_they_are_listed_with(name: str) -> None:
    entry = MODELS[name]
    pytest.importorskip(entry.library)
    with torch.device("meta"):
        model = entry.build()
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.params


def test_a_row_within_its_budgets() -> None:
    assert over_budget(whole_row(), MODELS["torchvision/resnet50"]) == []
    assert over_budget(whole_row("llama/1B", 59.0), MODELS["llama/1B"]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peak": 5 * GIB // 2}, "prune peak 2.50 GiB > 2.5 x dense + 1 GiB = 2.25"),
        ({"seconds": 3.6}, "8.1 s > 8"),
        ({"exports": 1}, "2 exports > 1"),
        ({"copies": 1}, "3 copies > 2"),
    ],
)
def test_each_budget_can_be_exceeded(change: dict[str, Any], says: str) -> None:
    row = whole_row()
    row.steps[-1] = replace(row.steps[-1], **change)
    assert over_budget(row, MODELS[row.name]) == [says]


def test_the_largest_model_has_budgets_of_its_own() -> None:
    entry = MODELS["llama/1B"]
    row = whole_row("llama/1B", 60.0)
    row.dense = 7 * GIB
    row.steps[1] = replace(row.steps[1], peak=17 * GIB)
    assert over_budget(row, entry) == ["constraint peak 17.00 GiB > 16", "180.5 s > 180"]


def test_the_table_written_out() -> None:
    row = whole_row()
    row.steps[-1] = replace(row.steps[-1], exports=1, peak=3 * GIB)
    failed = Row("llama/1B", failure="took more than 20 GiB", steps=row.steps[:1], dense=4 * GIB)
    failed.peaks_reset = False
    text = markdown([row, failed], MODELS, ABOUT)
    lines = text.splitlines()
    first = next(line for line in lines if line.startswith("| torchvision/resnet50"))
    assert first == (
        "| torchvision/resnet50 | 25.6 M | 0.50 | 2.00 (1.50) | 2.00 (1.50) | 2.00 (1.50) | 6.50 "
        "| 2.00, 4.0x (+1.00) | 2.00, 4.0x (+1.00) | 3.00, 6.0x (+2.00) | 2 | 2 | 45.0% | 2.0e-16 "
        "| prune peak 3.00 GiB > 2.5 x dense + 1 GiB = 2.25; 2 exports > 1 |"
    )
    second = next(line for line in lines if line.startswith("| llama/1B"))
    assert second == (
        "| llama/1B | 1005.9 M | 4.00 | 2.00 (1.50) | - | - | - | 2.00, 0.5x (+1.00) | - | - | 1 "
        "| 2 | - | - | took more than 20 GiB |"
    )
    assert "llama/1B: 180 s in all, 16 GiB." in lines
    assert "cannot reset a peak" in text
    assert "cannot reset a peak" not in markdown([row], MODELS, ABOUT)
    head = next(line for line in lines if line.startswith("| model"))
    assert head.count("|") == first.count("|") == second.count("|")
    told = json.loads(as_json([row], MODELS, ABOUT))
    assert told["about"] == ABOUT
    assert told["rows"][0]["over_budget"][1:] == ["2 exports > 1"]
    assert told["rows"][0]["steps"][2]["peak"] == 3 * GIB


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot([Row("llama/1B", failure="it failed")], "title", tmp_path) is None
    small = replace(whole_row("llama/10M"), params=10_000_000)
    path = plot([whole_row("llama/1B"), small, whole_row()], "title", tmp_path)
    assert path is not None
    assert path == tmp_path / "scale.png"
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("ending", "limit_s", "limit_gib", "failure"),
    [
        ("time.sleep(60)", 5.0, 20.0, "did not end within 5 s"),
        ("x = b'1' * 2**28; time.sleep(60)", 60.0, 0.2, "took more than 0.2 GiB"),
        ("sys.exit('it broke')", 60.0, 20.0, "ended with exit code 1 it broke"),
        ("pass", 60.0, 20.0, ""),
    ],
)
def test_what_was_measured_before_a_process_ended_is_kept(
    ending: str, limit_s: float, limit_gib: float, failure: str
) -> None:
    if "GiB" in failure and memory.resident() is None:
        pytest.skip("this system does not tell the memory of a process")
    measured = Row("llama/10M", params=7, steps=[Step("sparsify_", 1.0, 1.0, 1, 2, 1, 0)])
    told = json.dumps(asdict(measured))
    code = f"import sys, time; print({told!r}, flush=True); {ending}"
    row = command.one("llama/10M", 1, limit_s, limit_gib, (sys.executable, "-c", code))
    assert row == replace(measured, failure=failure)


def test_the_command_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"torchvision/resnet18": whole_row("torchvision/resnet18")}
    monkeypatch.setattr(command, "one", lambda name, *limits: rows[name])
    asked = ["--models", "torchvision", "--max-params", "12e6", "--out", str(tmp_path)]
    assert command.main(asked) == 0
    assert "torchvision/resnet18: sparsify_ 2.0 s 2.00 GiB, " in capsys.readouterr().out
    assert "| torchvision/resnet18 | 11.7 M |" in (tmp_path / "scale.md").read_text()
    about = json.loads((tmp_path / "scale.json").read_text())["about"]
    assert about["command"] == "python -m bench.scale --models torchvision --max-params=1.2e+07"
    assert about["threads"] == 2
    assert {"torch", "commit", "torchvision", "transformers"} <= about.keys()

    rows["torchvision/resnet18"].steps[0] = replace(whole_row().steps[0], exports=9)
    assert command.main(asked) == 1
    assert "OVER BUDGET: 9 exports > 1" in capsys.readouterr().out
    rows["torchvision/resnet18"] = Row("torchvision/resnet18", failure="it broke")
    assert command.main(asked) == 1
    assert "FAILED: it broke" in capsys.readouterr().out


def test_an_unknown_model_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--models", "llama/2B"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("bench.scale: --models: got 'llama/2B'; expected one of llama/10M, ")
    assert said.err.count("\n") == 1


def test_models_are_chosen_by_name_and_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list", "--models", "llama", "--max-params", "1e8"]) == 0
    assert capsys.readouterr().out.split() == ["llama/10M", "llama/30M"]
