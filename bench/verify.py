"""Nothing is timed before its tests pass.

A stem whose own tests are red is not timed. One whose own are green, and some other of its tests
red, is timed, and its rows say so.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from bench import ROOT, environment

_BINDING = ("autograd/test_autograd.py", "autograd/test_functional.py")
TESTS: dict[str, tuple[str, ...]] = {
    "gated_weight": (
        "maths/test_gated_weight.py",
        "kernels/test_kernel_gated_weight.py",
        *_BINDING,
    ),
    "scaled_weight": (
        "maths/test_gated_weight.py",
        "kernels/test_kernel_scaled_weight.py",
        "autograd/test_scaled_weight.py",
        *_BINDING,
    ),
    "compaction": ("maths/test_compaction.py", "kernels/test_kernel_compaction.py"),
    "hard_concrete": (
        "maths/test_hard_concrete.py",
        "kernels/test_kernel_hard_concrete.py",
        *_BINDING,
    ),
    "step": (
        "layers/test_layers.py",
        "layers/test_layers_in_a_model.py",
        "constraints/test_constraint.py",
        "maths/test_lagrangian.py",
        "kernels/test_kernel_lagrangian.py",
        "maths/test_advance.py",
        "kernels/test_kernel_advance.py",
        "kernels/test_kernel_gate_adam.py",
        "training/test_step_budget.py",
        *_BINDING,
    ),
    "skip": ("skipping/test_skip.py", "skipping/test_skip_streams.py"),
    "skipping_linear": (
        "autograd/test_skipping_linear.py",
        "kernels/test_kernel_skipping_linear.py",
        "maths/test_compaction.py",
        "kernels/test_kernel_compaction.py",
        "maths/test_packed_weight.py",
        "kernels/test_kernel_packed_weight.py",
        "maths/test_bounded_matmul.py",
        "kernels/test_kernel_bounded_matmul.py",
        "skipping/test_skip_on_device.py",
        "training/test_cuda_graph.py",
    ),
    "ffn": ("bench/test_ffn.py", "autograd/test_skipping_linear.py"),
    "prune": ("pruning/test_prune.py",),
    "latency": ("measures/test_latency.py", "pruning/test_timing.py"),
}
"""What is timed -> the files in tests/ that say it is right."""
AT_A_TIME = 6
"""Test files that run beside each other, at most: each is a process with its own memory."""
ON_THE_CHIP = ("pytest.mark.gpu", "@kernel_test")
"""A test file with one of these runs something on the GPU, where there is one."""


def on_the_chip(folder: Path) -> list[str]:
    """The test files that use the GPU, the kernels' first: all of each, since kernel tests run
    there unmarked."""
    paths = sorted(folder.glob("**/test_*.py"))
    paths.sort(key=lambda path: not path.name.startswith("test_kernel"))
    return [
        path.relative_to(folder).as_posix()
        for path in paths
        if any(sign in path.read_text(encoding="utf-8") for sign in ON_THE_CHIP)
        and path.name != "test_bench.py"
    ]


def red_files(report: Path) -> dict[str, list[str]]:
    """Test file -> its failures, those of collection included, from pytest's JUnit report."""
    red: dict[str, list[str]] = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("failure") is None and case.find("error") is None:
            continue
        # classname is tests.room.test_x or tests.room.test_x.Class; empty where collecting it
        # failed, which is named by its module.
        parts = (case.get("classname") or case.get("name", "")).split(".")
        last = next((at for at, part in enumerate(parts) if part.startswith("test_")), len(parts))
        file = "/".join(parts[parts[0] == "tests" : last + 1]) + ".py"
        red.setdefault(file, []).append(case.get("name", "?"))
    return red


def run_tests(
    files: Sequence[str], options: Sequence[str], limit_s: float | None, threads: int = 1
) -> dict[str, list[str]] | str:
    """Runs tests/ files in a process of their own: what is red, or why there is no answer."""
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed here (--skip-tests times what was not tested)"
    missing = [name for name in files if not (ROOT / "tests" / name).is_file()]
    if missing:
        return f"tests/{missing[0]} is missing"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *options, *(f"tests/{name}" for name in files)]
        try:
            # Standard output stays the bench's own.
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment(threads),
                stdout=sys.stderr,
                check=False,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            return f"the tests did not end within {limit_s:.0f} s"
        if not report.is_file():
            return f"pytest ended with exit code {done.returncode} and no report"
        red = red_files(report)
    if done.returncode == 0 or red:
        return red
    return f"pytest ended with exit code {done.returncode}"  # 5: nothing was collected


def run_apart(files: Sequence[str], limit_s: float, threads: int = 1) -> dict[str, list[str]]:
    """Like `run_tests`, each file in its own process: a fault on the GPU, or time that runs out,
    stays with the file it happened in. Several run at a time."""
    end = time.monotonic() + limit_s

    def outcome(name: str) -> dict[str, list[str]]:
        left = end - time.monotonic()
        found = run_tests([name], [], left, threads) if left > 0 else "no time was left for it"
        return {name: [found]} if isinstance(found, str) else found

    red: dict[str, list[str]] = {}
    with ThreadPoolExecutor(max(1, min(AT_A_TIME, (os.cpu_count() or 1) // 2))) as pool:
        for found in pool.map(outcome, files):
            red |= found
    return red


def is_own(stem: str, file: str) -> bool:
    """Whether a test file is of this stem alone, by its name."""
    return Path(file).stem in (f"test_{stem}", f"test_kernel_{stem}")


def verdict(
    stems: Iterable[str], outcome: Mapping[str, list[str]] | str
) -> tuple[dict[str, str], dict[str, str]]:
    """(stem -> why it is not timed, stem -> why its times are marked)."""
    if isinstance(outcome, str):
        return dict.fromkeys(stems, outcome), {}
    refused: dict[str, str] = {}
    marked: dict[str, str] = {}
    for stem in stems:
        failed = [
            (not is_own(stem, file), f"{file}::{name}")
            for file in TESTS[stem]
            for name in outcome.get(file, [])
        ]
        if not failed:
            continue
        shared, first = min(failed)
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        words = f"its tests are red: {first}{more}"
        (marked if shared else refused)[stem] = words
    return refused, marked
