"""The bench's own logic, its baselines, and the CPU's ops timed against them."""

from __future__ import annotations

import csv
import fnmatch
import io
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import (
    ROOT,
    __main__,
    bench_compaction,
    bench_gated_weight,
    bench_prune,
    bench_scaled_weight,
    bench_skip,
    bench_skipping_linear,
    bench_step,
    case,
    counting,
    networks,
    plot,
    published,
    registry,
    report,
    run,
    timing,
    verify,
)
from bench.case import Goal, Variant
from bench.report import Row
from l0fast import functional, prune, sparsify_
from l0fast.layers.draw import OnDevice
from l0fast.layers.handle import gated_layers, gates
from l0fast.maths.hard_concrete import HardConcrete
from l0fast.skipping import attach
from l0fast.training.models import build
from tests.helpers.draws import compact
from tests.helpers.steps import following
from tests.helpers.thinned import telling, thinned

LITTLE = timing.Effort(rounds=3, warmup=1, sample_ms=0.0, quick=True)


# --- timing ---------------------------------------------------------------------------------------


def test_quartiles_interpolate() -> None:
    assert timing.quartiles([5, 1, 4, 2, 3]) == (2, 3, 4)
    assert timing.quartiles([1, 2]) == (1.25, 1.5, 1.75)
    assert timing.quartiles([7]) == (7, 7, 7)


def test_ratios_pair_samples_of_one_round() -> None:
    # The machine is ten times slower in the second round; the quotient of medians would be 1.1.
    assert timing.paired_ratios([2, 20, 2.2], [1, 10, 2.0]) == (1.55, 2, 2)
    with pytest.raises(ValueError, match="zip"):
        timing.paired_ratios([1, 2], [1])


def test_samples_are_taken_in_turn() -> None:
    order: list[str] = []
    lengths = {"a": 1.0, "b": 0.25}

    def sample(call: Callable[[], object], repeats: int) -> float:
        name = str(call())
        order.append(name * repeats)
        return lengths[name]

    effort = timing.Effort(rounds=3, warmup=2, sample_ms=1.0)
    calls = {"a": lambda: "a", "b": lambda: "b"}
    samples, failures = timing.interleaved(calls, sample, effort)
    assert order == ["a"] * 3 + ["b"] * 3 + ["a", "bbbb"] * 3
    assert samples == {"a": [1.0] * 3, "b": [0.25] * 3}
    assert failures == {}


def test_inputs_rotate() -> None:
    seen: list[int] = []
    call = timing.rotating(seen.append, [(1,), (2,)])
    for _ in range(3):
        call()
    assert seen == [1, 2, 1]


def test_a_sample_is_the_time_of_one_call() -> None:
    assert 1.0 < timing.cpu_sample(lambda: time.sleep(0.002), 3) < 1000


# --- cases ----------------------------------------------------------------------------------------


def _fails() -> timing.Call:
    raise RuntimeError("no compiler\nand more")


def _raises_when_called() -> timing.Call:
    return lambda: 1 / 0


def _too_large() -> timing.Call:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 GiB")


@pytest.mark.parametrize(
    ("bad", "status"),
    [(_fails, "failed"), (_raises_when_called, "failed"), (_too_large, "out of memory")],
)
def test_a_variant_that_fails_is_a_row_and_the_others_are_measured(
    bad: Callable[[], timing.Call], status: str
) -> None:
    x = torch.ones(4)
    variants = [
        Variant("base", lambda: lambda: x + x),
        Variant("bad", bad),
        Variant("ours", lambda: lambda: (x + x).sum().item()),
    ]
    goals = [
        Goal("ours", 1e9, "<= 1e9x base", "base"),
        Goal("ours", 0, "no .item()", count="items"),
        Goal("bad", 1, "<= 1x base", "base"),
    ]
    options: Any = {"baseline": "base", "goals": goals, "count_ops": True, "bytes_moved": 48}
    base, failed, timed, counted = case.measure("c", "cpu", variants, LITTLE, **options)
    assert (failed.variant, failed.status) == ("bad", status)
    words = "RuntimeError: no compiler", "ZeroDivisionError", "OutOfMemoryError: CUDA out of"
    assert failed.note.startswith(words)
    assert (base.ops, base.items, base.baseline, base.reached) == (1, 0, None, None)
    assert base.p50_ms is not None
    assert base.gb_per_s == pytest.approx(48 / base.p50_ms / 1e6)
    assert (timed.goal, timed.reached, timed.baseline) == ("<= 1e9x base", True, "base")
    assert (counted.ops, counted.items, counted.reached) == (3, 1, False)
    assert counted.ratio_p50 is None


def test_a_run_of_several_calls_is_divided() -> None:
    variants = [
        Variant("one", lambda: lambda: time.sleep(0.002)),
        Variant("four", lambda: lambda: time.sleep(0.008), calls=4),
    ]
    _, four = case.measure("c", "cpu", variants, LITTLE, baseline="one")
    assert four.ratio_p50 is not None
    assert four.ratio_p50 < 3  # not 4


def test_a_goal_can_be_missed_and_unmeasured() -> None:
    time_goal, count_goal = Goal("v", 2.0, "", "b"), Goal("v", 1, "", count="launches")
    assert time_goal.reached(1.9, {}) is True
    assert time_goal.reached(2.1, {}) is False
    assert time_goal.reached(None, {}) is None
    assert count_goal.reached(9.0, {"launches": 1}) is True
    assert count_goal.reached(0.1, {"launches": 2}) is False
    assert count_goal.reached(0.1, {}) is None


def test_names_select_cases() -> None:
    cases = registry.cases(quick=True)
    assert len({one.name for one in cases}) == len(cases)
    assert {registry.stem(one.name) for one in cases} == set(registry.MODULES) == set(verify.TESTS)
    assert registry.select(cases, []) == cases
    chosen = registry.select(cases, ["step/cpu", "prune"])
    assert {one.device for one in chosen} == {"cpu"}
    assert [one.name for one in chosen][:2] == ["step/cpu/mlp", "step/cpu/lenet5"]
    with pytest.raises(ValueError, match=r"^names: got 'ste'; expected hard_concrete"):
        registry.select(cases, ["ste"])


def test_cases_come_in_the_order_of_their_worth() -> None:
    names = [one.name for one in registry.cases(quick=False) if one.device == "cuda"]
    first = ["skipping_linear/cuda/ffn/density-", "gated_weight/cuda/", "hard_concrete/cuda/"]
    starts = [next(i for i, name in enumerate(names) if name.startswith(one)) for one in first]
    assert starts == [0, 6, 12]
    assert names[12].startswith("hard_concrete/cuda/")
    assert names.index("step/cuda/mlp") < names.index("step/cuda/resnet50")
    assert [name.endswith("/2^28") for name in names[-6:]] == [True] * 6
    assert names[-7].endswith("/density-0.3")
    for pattern in (pattern for patterns in registry.FIRST + registry.LAST for pattern in patterns):
        assert any(fnmatch.fnmatchcase(name, pattern) for name in names), pattern


def test_bytes_an_element() -> None:
    bytes_of = bench_gated_weight.bytes_per_element
    assert [bytes_of(torch.float32, one) for one in bench_gated_weight.PASSES] == [12, 20, 32]
    assert [bytes_of(torch.bfloat16, one) for one in bench_gated_weight.PASSES] == [8, 14, 22]


def test_orders_by_nonzero_are_the_ops() -> None:
    sizes = (30, 1, 69)
    alive = torch.rand(100) < 0.5
    by_hand = bench_compaction.by_nonzero(alive, sizes)
    for (index, place, count), order in zip(
        by_hand, functional.compaction(alive, sizes), strict=True
    ):
        assert torch.equal(index, order.index.long())
        assert torch.equal(place, order.place.long())
        assert [count] == order.count.tolist()


@pytest.mark.parametrize("dim", [0, 1])
def test_scaling_by_autograd_is_the_same_work(dim: int) -> None:
    weight = torch.randn(6, 5, requires_grad=True)
    log_alpha = torch.randn(weight.shape[dim], requires_grad=True)
    found: list[tuple[torch.Tensor, ...]] = []
    for op in (bench_scaled_weight.by_autograd, bench_scaled_weight.ours):
        torch.manual_seed(0)
        masked, expected_open = op(weight, log_alpha, dim)
        loss = masked.square().sum() + expected_open.sum()
        found.append((masked.detach(), *torch.autograd.grad(loss, (weight, log_alpha))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("stem", thinned(["compaction", "scaled_weight"], 2))
def test_the_ops_own_cases_are_measured(stem: str) -> None:
    cases = [one for one in registry.cases(quick=True) if registry.stem(one.name) == stem]
    for one in cases:
        if one.device == "cpu":
            assert {row.status for row in one.run(LITTLE)} == {report.MEASURED}
    assert {one.device for one in cases} == {"cpu", "cuda"}


def test_every_step_trains() -> None:
    for model, shape in (("mlp", (8, 1, 28, 28)), ("lenet5", (4, 1, 28, 28))):
        x, y = torch.randn(shape), torch.randint(10, shape[:1])
        nets = [build(model, shape[1:], 10) for _ in range(4)]
        steps = [
            bench_step.dense_step(nets[0], "cpu"),
            bench_step.l0fast_step(nets[1], "cpu", "weight"),
            published.published_step(published.publish_(nets[2], "unstructured"), 0.5),
            published.plain_step(published.publish_(nets[3], "structured"), 0.5),
        ]
        for net, step in zip(nets, steps, strict=True):
            before = [parameter.detach().clone() for parameter in net.parameters()]
            step(x, y)
            moved = zip(net.parameters(), before, strict=True)
            assert all(not torch.equal(now, then) for now, then in moved)


def test_pruned_and_by_hand_are_the_same_work() -> None:
    rows = bench_prune._run("prune/x", "lenet5", None, 2, "cpu", LITTLE)
    assert [row.variant for row in rows] == ["dense original", "by hand", "pruned by l0fast"]
    assert rows[1].note == rows[2].note == "kept 10-25-" + rows[1].note.split("-", 2)[2]
    assert rows[2].goal == "<= 1.02x by hand"


def test_large_networks_have_their_published_sizes() -> None:
    with torch.device("meta"):
        resnet, wide = networks.resnet50(), networks.wrn28_10()
    assert sum(p.numel() for p in resnet.parameters()) == 25_557_032
    assert sum(p.numel() for p in wide.parameters()) == 36_479_194
    assert len(networks.gate_counts(resnet)) == 54
    with torch.device("meta"):
        transformer = networks.vit_b16()
    assert sum(p.numel() for p in transformer.parameters()) == 86_567_656
    assert transformer(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    assert wide(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert resnet(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)


def test_counting_ops_and_kernels() -> None:
    x = torch.ones(2, 3)
    assert counting.dispatched(lambda: float(x.t().mul(2).sum())) == (3, 1)
    cats = ["kernel", "cpu_op", "gpu_memset", "gpu_user_annotation", "gpu_memcpy", None]
    events = [{"name": str(i), "cat": cat} for i, cat in enumerate(cats)]
    assert counting.kernels_in([*events, {"name": "no category"}]) == ["0", "2", "4"]


# --- the baselines --------------------------------------------------------------------------------


def test_the_published_gate_is_the_same_function() -> None:
    distribution = HardConcrete()
    log_alpha = torch.randn(4096, requires_grad=True)
    torch.manual_seed(3)
    theirs = published.gate(log_alpha)
    torch.manual_seed(3)
    ours = functional.hard_concrete(log_alpha)
    torch.testing.assert_close(ours.z, theirs, rtol=0, atol=1e-4)
    p = published.open_probability(log_alpha)
    torch.testing.assert_close(p, distribution.open_probability(log_alpha))
    torch.testing.assert_close(ours.expected_open.squeeze(), p.sum())
    weights = torch.randn(4096)
    (one,) = torch.autograd.grad((theirs * weights).sum() + p.sum(), log_alpha)
    (other,) = torch.autograd.grad((ours.z * weights).sum() + ours.expected_open.sum(), log_alpha)
    # Where rounding decides whether a gate is clamped, one of the two has no gradient.
    clear = ((theirs > 1e-3) & (theirs < 1 - 1e-3)) | ((theirs == ours.z) & (theirs % 1 == 0))
    assert clear.float().mean() > 0.99
    torch.testing.assert_close(one[clear], other[clear], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gates", ["structured", "unstructured"])
def test_published_layers_mask_what_they_say(gates: str) -> None:
    model = published.publish_(build("lenet5", (1, 28, 28), 10), gates)
    conv, *_, linear = published.gated(model)
    sizes = {"structured": [20, 50, 800, 500], "unstructured": [500, 25_000, 400_000, 5000]}
    assert [layer.log_alpha.numel() for layer in published.gated(model)] == sizes[gates]
    assert float(published.density(model).detach()) == pytest.approx(
        published.INITIAL_DENSITY, abs=1e-5
    )
    with torch.no_grad():
        conv.log_alpha.fill_(-100)
        linear.log_alpha.fill_(-100)
    x = torch.randn(2, 1, 28, 28)
    bias = linear.dense.bias
    assert bias is not None
    assert torch.equal(model(x), bias.expand(2, 10))
    out = conv(x)
    shown = torch.zeros_like(out)
    if gates == "unstructured":  # a gate of a single weight leaves the bias
        assert conv.dense.bias is not None
        shown = shown + conv.dense.bias.view(-1, 1, 1)
    assert torch.equal(out, shown)


# --- results --------------------------------------------------------------------------------------

ROWS = [
    Row("a/cpu", "base", "cpu", p25_ms=1.0, p50_ms=2.0, p75_ms=3.0, ops=7, items=0),
    Row(
        "a/cpu",
        "ours, fast",
        "cpu",
        p25_ms=0.5,
        p50_ms=1.0,
        p75_ms=1.5,
        baseline="base",
        ratio_p25=0.4,
        ratio_p50=0.5,
        ratio_p75=0.6,
        goal="<= 0.4x base",
        reached=False,
    ),
    Row("a/cpu", "broken", "cpu", status="failed", note="RuntimeError: no"),
    Row("a/cuda", "all", "cuda", status=report.NEEDS_GPU),
]


def test_the_table_says_what_was_reached_and_what_was_not_measured() -> None:
    lines = report.table(ROWS).splitlines()
    assert lines[1] == "a/cpu"
    assert lines[2].split() == ["base", "2.00", "(1.00-3.00)", "7", "ops,", "0", ".item()"]
    assert "0.500x base" in lines[3].replace("0.5x", "0.500x")
    assert "<= 0.4x base: NOT REACHED" in lines[3]
    assert lines[4].split()[:2] == ["broken", "failed"]
    assert lines[5:] == ["1 cases need a GPU:", "  a/cuda"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234.5, "1234"), (12.34, "12.3"), (1.0, "1.00"), (0.01234, "0.0123")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.significant(value) == text


def test_results_hold_where_they_are_from(tmp_path: Path) -> None:
    about = report.facts("python -m bench", 1, tested=True)
    assert about["torch"] == torch.__version__
    assert about["tests"] == "passed"
    report.write(ROWS[:1], about, tmp_path / "new")
    report.write(ROWS, about, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "results.csv",
        "results.json",
    ]
    read = json.loads((tmp_path / "new" / "results.json").read_text())
    assert read["about"] == about
    assert [Row(**row) for row in read["rows"]] == ROWS
    text = (tmp_path / "new" / "results.csv").read_text()
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [line["variant"] for line in lines] == [row.variant for row in ROWS]
    assert all(line["commit"] == about["commit"] for line in lines)


def test_a_plot_is_drawn_of_ratios_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot.plot([ROWS[0], ROWS[2]], "t", tmp_path) is None
    path = plot.plot(ROWS, "t", tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")


# --- no speed without green -----------------------------------------------------------------------

RED = """\
import pytest

def test_green():
    pass

@pytest.mark.parametrize("x", [1])
def test_red(x):
    assert x == 2
"""


def _checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """A checkout with these tests, in one room."""
    (tmp_path / "tests" / "room").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "tests" / "room" / f"{name}.py").write_text(text)
    monkeypatch.setattr(verify, "ROOT", tmp_path)


def test_red_tests_are_named_and_refuse_their_stem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = "import nothing_of_that_name\n"
    _checkout(tmp_path, monkeypatch, test_a=RED, test_b="def test_b():\n    pass\n", test_c=broken)
    files = ["room/test_a.py", "room/test_b.py", "room/test_c.py"]
    outcome = verify.run_tests(files, ["--continue-on-collection-errors"], 120)
    assert isinstance(outcome, dict)
    assert set(outcome) == {"room/test_a.py", "room/test_c.py"}
    assert outcome["room/test_a.py"] == ["test_red[1]"]
    tests = {"a": ("room/test_a.py",), "b": ("room/test_b.py",), "c": ("room/test_a.py",)}
    monkeypatch.setattr(verify, "TESTS", tests)
    red = "its tests are red: room/test_a.py::test_red[1]"
    # Its own tests refuse a stem; what it shares with others marks it.
    assert verify.verdict(["a", "b", "c"], outcome) == ({"a": red}, {"c": red})


def test_no_answer_from_the_tests_refuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _checkout(tmp_path, monkeypatch, test_a="import os\nos._exit(9)\n", test_b="x = 1\n")
    died = verify.run_tests(["room/test_a.py"], [], 120)
    assert died == "pytest ended with exit code 9 and no report"
    assert verify.run_tests(["room/test_b.py"], [], 120) == "pytest ended with exit code 5"
    assert verify.run_tests(["room/test_x.py"], [], 120) == "tests/room/test_x.py is missing"
    assert verify.verdict(["step"], "why") == ({"step": "why"}, {})


def test_files_run_apart_do_not_share_a_fate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = "import os\nos._exit(9)\n"
    _checkout(tmp_path, monkeypatch, test_a=dies, test_b="def test_b():\n    pass\n")
    red = verify.run_apart(["room/test_a.py", "room/test_b.py"], 120)
    assert red == {"room/test_a.py": ["pytest ended with exit code 9 and no report"]}
    assert verify.run_apart(["room/test_b.py"], 0) == {
        "room/test_b.py": ["no time was left for it"]
    }


def test_missing_pytest_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert str(verify.run_tests([], [], None)).startswith("pytest is not installed here")


def test_the_files_that_guard_each_stem_exist() -> None:
    named = {file for files in verify.TESTS.values() for file in files}
    assert all((ROOT / "tests" / file).is_file() for file in named)
    chip = verify.on_the_chip(ROOT / "tests")
    assert {f"kernels/test_kernel_{stem}.py" for stem in ("gated_weight", "hard_concrete")} <= set(
        chip
    )
    assert "autograd/test_autograd.py" in chip


# --- the command ----------------------------------------------------------------------------------


def _no_cases(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing may be timed")


def test_red_tests_stop_the_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "run_tests", lambda *_: {"pruning/test_prune.py": ["test_x"]})
    timed: list[str] = []
    monkeypatch.setattr(run, "run", lambda cases, *_, **__: timed.extend(cases))
    out = tmp_path / "out"
    names = ["prune", "step/cpu/mlp"]
    assert __main__.main([*names, "--quick", "--out", str(out)]) == 1
    assert timed == ["step/cpu/mlp"]
    assert "prune is not timed: its tests are red" in capsys.readouterr().err
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"refused"}
    assert all(row["case"].startswith("prune/") for row in rows)


def test_skipped_tests_are_said_loudly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "run_tests", _no_cases)
    monkeypatch.setattr(run, "run", lambda *_, **__: None)
    command = ["step/cpu", "--skip-tests", "--quick", "--out", str(tmp_path / "secret")]
    assert __main__.main(command) == 0
    printed = capsys.readouterr()
    assert "NOTHING WAS TESTED" in printed.err
    assert printed.out.startswith("NOT TESTED: ")
    about = json.loads((tmp_path / "secret" / "results.json").read_text())["about"]
    assert about["tests"] == "SKIPPED"
    assert about["command"] == "python -m bench step/cpu --quick --skip-tests"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nothing"], "bench: names: got 'nothing'; expected hard_concrete"),
        (["--out", "{file}", "--skip-tests", "step/cpu"], "--out: got "),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = [one.format(file=tmp_path / "file") for one in arguments]
    assert __main__.main(given) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith(line)


def test_the_gpu_run_tests_first_and_keeps_to_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds: set[str] = set()
    timed: list[str] = []
    times: list[float] = []

    def tests(files: Sequence[str], limit_s: float, threads: int) -> dict[str, list[str]]:
        assert files[0].startswith("kernels/test_kernel")
        assert limit_s == 240
        return {
            "kernels/test_kernel_hard_concrete.py": ["test_x"],
            "constraints/test_constraint.py": ["test_y"],
        }

    def measured(
        cases: dict[str, str], emit: Any, *_: object, deadline: float, **__: object
    ) -> None:
        kinds.update(cases.values())
        timed.extend(cases)
        emit([Row(name, "l0fast", "cuda", p25_ms=1, p50_ms=1, p75_ms=1) for name in cases])
        times.append(deadline - time.monotonic())

    monkeypatch.setattr(__main__.cuda, "available", lambda: True)
    monkeypatch.setattr(verify, "run_apart", tests)
    monkeypatch.setattr(run, "run", measured)
    monkeypatch.setenv("OUT", str(tmp_path / "named"))
    assert __main__.main(["--gpu"]) == 1
    assert kinds == {"cuda"}
    assert {registry.stem(name) for name in timed} == {
        "gated_weight",
        "scaled_weight",
        "compaction",
        "step",
        "skipping_linear",
        "ffn",
    }
    assert all(seconds < 8 * 60 for seconds in times)
    assert "red: tests/kernels/test_kernel_hard_concrete.py: test_x" in capsys.readouterr().err
    rows = json.loads((tmp_path / "named" / "results.json").read_text())["rows"]
    of: dict[str, set[str]] = {}
    for row in rows:
        of.setdefault(row["status"], set()).add(registry.stem(row["case"]))
    assert of["refused"] == {"hard_concrete"}
    assert of["measured, UNTESTED"] == {"step"}
    marks = {row["note"] for row in rows if row["status"] == "measured, UNTESTED"}
    assert marks == {"UNTESTED: its tests are red: constraints/test_constraint.py::test_y"}


def test_without_git_the_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_git", lambda *_: None)
    for folder in ("l0fast", "kernels", "bench"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "kernels" / "a.py").write_text("1")
    first = report.commit()
    assert first.startswith("sources ")
    assert report.commit() == first
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert report.commit() != first


@pytest.mark.parametrize("bad", [["--threads", "0"], ["--minutes", "0"], ["--minutes", "nan"]])
def test_numbers_out_of_range_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__.main(bad)


def test_without_a_gpu_the_gpu_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__.cuda, "available", lambda: False)
    assert __main__.main(["--gpu"]) == 2
    assert capsys.readouterr().err == (
        "bench --gpu: this machine has no CUDA device (PyTorch sees none)\n"
    )
    assert __main__.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "step/cpu/mlp" in listed
    assert "step/cuda/mlp  (needs a GPU)" in listed


# --- the process that measures --------------------------------------------------------------------

WORKER = """\
import json, os, sys, time
asked = json.load(sys.stdin)
for name in asked["cases"]:
    print(json.dumps({"start": name}), flush=True)
    if name == "hangs":
        time.sleep(100)
    if name == "dies":
        os._exit(7)
    row = {"case": name, "variant": "v", "device": "cpu", "p50_ms": 1.0}
    print("what a library prints")
    print(json.dumps({"rows": [row], "done": name}), flush=True)
    if name == "poisons":
        sys.exit(3)
"""


def _drive(tmp_path: Path, cases: Sequence[str], text: str = WORKER, **options: Any) -> list[Row]:
    script = tmp_path / "worker.py"
    script.write_text(text)
    rows: list[Row] = []
    devices = dict.fromkeys(cases, "cpu")
    command = [sys.executable, "-I", "-S", str(script)]
    settings: Any = {"quick": True, "threads": 1, "case_limit_s": 3.0, **options}
    run.run(devices, rows.extend, worker=command, **settings)
    return rows


def test_a_case_that_dies_hangs_or_poisons_leaves_the_others(tmp_path: Path) -> None:
    rows = _drive(tmp_path, ["one", "dies", "two", "poisons", "hangs", "three"])
    assert [row.case for row in rows] == ["one", "dies", "two", "poisons", "hangs", "three"]
    assert [row.status == report.MEASURED for row in rows] == [True, False, True, True, False, True]
    assert rows[1].note == "the measuring process ended with exit code 7"
    assert rows[4].note == "did not end within 3 s"


def test_time_that_runs_out_leaves_what_is_measured(tmp_path: Path) -> None:
    rows = _drive(tmp_path, ["one", "hangs", "two"], deadline=time.monotonic() + 2)
    assert [row.status for row in rows] == ["measured", "failed", "out of time"]


def test_a_process_that_never_starts_is_not_tried_for_ever(tmp_path: Path) -> None:
    rows = _drive(tmp_path, ["one", "two"], text="import sys\nsys.exit(5)\n")
    assert {row.note for row in rows} == {"the measuring process ended with exit code 5"}
    assert [row.status for row in rows] == ["failed", "failed"]


def test_the_worker_answers_for_real_cases() -> None:
    asked = {"cases": ["step/cuda/mlp", "hard_concrete/cpu/mlp/forward+backward"]}
    if torch.cuda.is_available():
        asked["cases"].pop(0)
    done = subprocess.run(
        [sys.executable, "-m", "bench.worker"],
        input=json.dumps({**asked, "quick": True, "threads": 1}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["start"] for answer in answers[::2]] == asked["cases"]
    rows = [Row(**row) for answer in answers[1::2] for row in answer["rows"]]
    assert [row.variant for row in rows[-2:]] == ["published, by layer", "l0fast, one draw"]
    assert rows[-1].ratio_p50 is not None
    if len(asked["cases"]) == 2:
        assert (rows[0].status, rows[0].note) == ("failed", "RuntimeError: no CUDA device")


# --- the CPU's ops beside the published formulation (pytest-benchmark) ----------------------------

SIZES = (784, 300, 100)


def _published_gates(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    z, expected_open = published.hard_concrete(list(log_alpha.split(SIZES)))
    return torch.cat(z), torch.stack(expected_open)


GATE_OPS: dict[str, Callable[[Tensor], Any]] = {
    "published": _published_gates,
    "l0fast": lambda log_alpha: functional.hard_concrete(log_alpha, SIZES, backend="torch"),
}
WEIGHT_OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "published": published.gated_weight,
    "l0fast": lambda w, log_alpha: functional.gated_weight(w, log_alpha, backend="torch"),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", GATE_OPS.values(), ids=GATE_OPS)
def test_hard_concrete_on_the_cpu(op: Callable[[Tensor], Any], benchmark: Any) -> None:
    benchmark.group = "hard_concrete, MLP 784-300-100, forward and backward"
    log_alpha = torch.randn(sum(SIZES), requires_grad=True)
    gradients = torch.randn(sum(SIZES)), torch.rand(3)

    def both() -> Tensor:
        return torch.autograd.grad(tuple(op(log_alpha)), log_alpha, gradients)[0]

    got = benchmark.pedantic(both, rounds=20, warmup_rounds=2)
    assert got.shape == log_alpha.shape
    assert bool((got != 0).all())  # every gate has at least its penalty's gradient


@pytest.mark.unpoisoned
@pytest.mark.parametrize("op", WEIGHT_OPS.values(), ids=WEIGHT_OPS)
def test_gated_weight_on_the_cpu(op: Callable[[Tensor, Tensor], Any], benchmark: Any) -> None:
    benchmark.group = "gated_weight, 300 x 784, forward and backward"
    weight, log_alpha, gradient = torch.randn(3, 300, 784).unbind()
    weight.requires_grad_()
    log_alpha.requires_grad_()

    def both() -> tuple[Tensor, ...]:
        results = tuple(op(weight, log_alpha))
        return torch.autograd.grad(results, (weight, log_alpha), (gradient, torch.ones(())))

    dweight, dlog_alpha = benchmark.pedantic(both, rounds=5, warmup_rounds=1)
    assert dweight.shape == dlog_alpha.shape == weight.shape
    assert bool((dlog_alpha != 0).all())


@pytest.mark.parametrize("density", telling([1.0, 0.3], [0.3]))
def test_the_skipping_block_is_rehearsed_small(
    density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, by the reference: what it times computes, and skips."""
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    rows = bench_skipping_linear.ffn("x", (16, 96, 8), density, LITTLE, "cpu")
    assert [row.variant for row in rows] == ["dense", "masked", "skipped"]
    assert {row.status for row in rows} == {report.MEASURED}, rows
    block = bench_skipping_linear._block((16, 96, 8), density, True, "cpu")
    block(torch.randn(8, 16, dtype=torch.bfloat16))
    reader: Any = block.get_submodule("2")
    assert isinstance(compact(reader), OnDevice)
    maker: Any = following(block.get_submodule("0")).compact
    assert maker.rows is compact(reader).cols


def tiny_vit() -> nn.Module:
    return networks.ViT(image=8, patch=4, width=12, depth=2, heads=3, hidden=16, classes=10)


def tiny_resnet() -> nn.Module:
    parts = [networks._Bottleneck(8, 6, 1), networks._Bottleneck(24, 6, 1)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)]
    return nn.Sequential(networks._conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *parts, *pool)


def tiny_wide() -> nn.Module:
    parts = [networks._Wide(8, 12, 1), networks._Wide(12, 12, 1), nn.BatchNorm2d(12), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)]
    return nn.Sequential(networks._conv(3, 8, 3), *parts, *pool)


@pytest.mark.parametrize(
    ("make", "density"),
    telling(
        itertools.product([tiny_resnet, tiny_wide, tiny_vit], [1.0, 0.3]),
        [(tiny_vit, 1.0), (tiny_wide, 0.3)],
    ),
)
def test_the_large_steps_are_rehearsed_small(make: Callable[[], nn.Module], density: float) -> None:
    """On a CPU: gates go by the structure, and below a density of 1 a variant skips."""
    rows = bench_step._large("x", make, (4, 3, 8, 8), density, LITTLE, "cpu")
    assert {row.status for row in rows} == {report.MEASURED}, rows
    titles = ["dense", "l0fast, structured", *(["l0fast, skipped"] if density < 1 else [])]
    assert [row.variant for row in rows] == titles
    assert [row.goal for row in rows if row.goal] == ["<= 1.03x dense"] * (density == 1)
    model = make()
    example = torch.randn(2, 3, 8, 8)
    bench_step.l0fast_step(model, "cpu", density=density, example=example, skip=True)
    layers = gated_layers(model)
    assert {layer.gates for layer in layers.values()} == {"input"}
    if make is tiny_vit:
        assert [(one.num_gates, one.units) for one in layers.values()] == [(3, 4), (16, 1)] * 2
    assert gates(model).skipping.links


def test_the_gpu_run_has_the_rows_of_the_goals() -> None:
    names = {one.name for one in registry.cases(quick=False) if one.device == "cuda"}
    for model in ("resnet50", "wrn28-10", "vit-b16"):
        assert {f"step/cuda/{model}", f"step/cuda/{model}/density-0.3"} <= names
    for density in (0.5, 0.3, 0.1):
        assert f"skipping_linear/cuda/ffn/density-{density:g}" in names
    assert bench_skipping_linear.FFN == (4096, 16384, 8192)


def test_every_net_can_be_skipped_and_compacted() -> None:
    for net in bench_skip.NETS.values():
        small = net.make([max(width // 8, 2) for width in net.widths])
        assert sum(p.numel() for p in small.parameters()) > 0
    widths = (6, 5, 9, 7)
    model = bench_skip._resnet(widths)
    x = torch.randn(2, 3, 8, 8)
    sparsify_(model, example_inputs=x, skip=True)
    makers = sorted(len(link.makers) for link in gates(model).skipping.links)
    assert makers == [1, 1, 1, 1, 3, 3]


@pytest.mark.exhaustive
def test_lenet_at_the_end_has_the_gates_that_it_says() -> None:
    example = torch.randn(1, 1, 28, 28)
    for shrunk in (False, True):
        small: Any = prune(bench_skip._settled("auto", shrunk), example_inputs=example)
        # Flattened channels are gathered: the Linear has no other inputs than those open.
        shapes = [tuple(p.shape) for p in small.parameters() if p.dim() > 1]
        assert shapes == [(20, 1, 5, 5), (23, 20, 5, 5), (246, 57), (10, 246)]
    rows = bench_skip.at_the_end("x", LITTLE)
    assert [row.variant for row in rows] == ["dense", "masked", "skipped", "shrunk", "pruned"]
    assert {row.status for row in rows} == {report.MEASURED}
