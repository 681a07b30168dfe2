"""`python -m bench`: test, then time, then say what was reached.

Exit code: 0 if all that could run here was measured (goals missed included), 1 if something failed,
was refused or ran out of time, 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT, cuda, registry, report, run, verify
from bench.case import Case
from bench.plot import plot
from bench.report import MEASURED, NEEDS_GPU, OUT_OF_MEMORY, Row, marked

GPU_MINUTES = 8.0
GPU_TEST_SHARE = 0.5
"""Of the time there is, the most that the tests may take."""
WRITING_S = 10.0
UNTESTED = """\
!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!
!!  --skip-tests: NOTHING WAS TESTED. These are times of code that may be
!!  wrong; they are marked so and must not be quoted.
!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!"""
CASE_LIMIT_S = {"cpu": 900.0, "cuda": 150.0}


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="what to measure, for example step or step/cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds and sizes")
    parser.add_argument("--gpu", action="store_true", help="every GPU row, unattended")
    parser.add_argument("--minutes", type=float, help=f"stop then (--gpu: {GPU_MINUTES:g})")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--out", type=Path, help="folder for results.csv, .json and .png, replaced")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    parser.add_argument(
        "--skip-tests", action="store_true", help="for development: time without running the tests"
    )
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads: got {arguments.threads}; expected a whole number >= 1")
    if arguments.minutes is not None and not arguments.minutes > 0:
        parser.error(f"--minutes: got {arguments.minutes}; expected a number > 0")
    if arguments.minutes is None and arguments.gpu:
        arguments.minutes = GPU_MINUTES
    return arguments


def _out(arguments: argparse.Namespace) -> Path:
    """The folder for results: --out, else $OUT, else a folder that git ignores."""
    if arguments.out is not None:
        return arguments.out
    named = os.environ.get("OUT")
    return Path(named) if named else ROOT / "runs" / ("gpu" if arguments.gpu else "bench")


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run, without the folder of the results."""
    words = ["python", "-m", "bench", *arguments.names]
    words += [f"--{flag}" for flag in ("quick", "gpu") if getattr(arguments, flag)]
    words += [f"--threads={arguments.threads}"] if arguments.threads != 1 else []
    words += ["--skip-tests"] if arguments.skip_tests else []
    return shlex.join(words)


def _tested(
    arguments: argparse.Namespace, cases: Sequence[Case], limit_s: float | None
) -> tuple[dict[str, str], dict[str, str]]:
    """Runs the tests; (stem -> why it is not timed, stem -> why its times are marked)."""
    stems = list(dict.fromkeys(registry.stem(case.name) for case in cases))
    if arguments.skip_tests:
        print(UNTESTED, file=sys.stderr)
        return {}, {}
    if not stems:
        return {}, {}
    outcome: dict[str, list[str]] | str
    if arguments.gpu:
        files = verify.on_the_chip(ROOT / "tests")
        print(f"testing: {' '.join(files)}", file=sys.stderr, flush=True)
        assert limit_s is not None
        outcome = verify.run_apart(files, limit_s, arguments.threads)
        for file, failed in outcome.items():
            print(f"red: tests/{file}: {', '.join(failed)}", file=sys.stderr)
    else:
        files = sorted({file for stem in stems for file in verify.TESTS[stem]})
        print(f"testing: {' '.join(files)}", file=sys.stderr, flush=True)
        options = [] if cuda.available() else ["-m", "not gpu"]
        outcome = verify.run_tests(files, options, limit_s, arguments.threads)
    refused, doubtful = verify.verdict(stems, outcome)
    for stem, why in refused.items():
        print(f"{stem} is not timed: {why}", file=sys.stderr)
    for stem, why in doubtful.items():
        print(f"{stem} is timed, and marked as untested: {why}", file=sys.stderr)
    return refused, doubtful


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    started = time.monotonic()
    arguments = _arguments(sys.argv[1:] if argv is None else argv)
    gpu = cuda.available()
    if arguments.gpu and not gpu:
        print("bench --gpu: this machine has no CUDA device (PyTorch sees none)", file=sys.stderr)
        return 2
    try:
        cases = registry.select(registry.cases(arguments.quick), arguments.names)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if arguments.gpu:
        cases = [case for case in cases if case.device == "cuda"]
    if arguments.list:
        for case in cases:
            print(case.name + ("" if case.device == "cpu" or gpu else f"  ({NEEDS_GPU})"))
        return 0

    seconds = None if arguments.minutes is None else 60 * arguments.minutes
    deadline = None if seconds is None else started + seconds - WRITING_S
    out = _out(arguments)
    here = [case for case in cases if case.device == "cpu" or gpu]
    about = report.facts(_command(arguments), arguments.threads, not arguments.skip_tests)
    rows: list[Row] = []

    def emit(more: Sequence[Row]) -> None:
        rows.extend(more)
        report.write(rows, about, out)  # keep what is measured, even if a later step fails

    try:
        emit([])
    except OSError as error:
        print(f"--out: got {out}; expected a folder to write to ({error})", file=sys.stderr)
        return 2
    share = None if seconds is None else GPU_TEST_SHARE * seconds
    refused, doubtful = _tested(arguments, here, share)
    if refused or doubtful:
        about["tests"] = "SOME FAILED"
    emit(
        [
            Row(case.name, "all", case.device, status="refused", note=refused[stem])
            for case in here
            if (stem := registry.stem(case.name)) in refused
        ]
    )
    for device in ("cuda", "cpu"):
        chosen = {
            case.name: case.device
            for case in here
            if case.device == device and registry.stem(case.name) not in refused
        }
        run.run(
            chosen,
            lambda more: emit([marked(row, doubtful.get(registry.stem(row.case))) for row in more]),
            quick=arguments.quick,
            threads=arguments.threads,
            case_limit_s=CASE_LIMIT_S[device],
            deadline=deadline,
        )
    emit([Row(c.name, "all", c.device, status=NEEDS_GPU) for c in cases if c not in here])

    where = about["gpu"] if any(case.device == "cuda" for case in here) else about["cpu"]
    title = f"{where}, torch {about['torch']}, commit {about['commit']}, {about['date']}"
    if arguments.skip_tests:
        title = "NOT TESTED: " + title
    print(title)
    print(report.table(rows))
    try:
        picture = plot(rows, title, out)
    except Exception as error:  # the numbers are of use without the picture
        print(f"no plot: {error}", file=sys.stderr)
        picture = None
    names = ["results.csv", "results.json", *([picture.name] if picture else [])]
    print(f"{', '.join(names)} in {out}")
    fine = MEASURED, NEEDS_GPU, OUT_OF_MEMORY
    return 0 if all(row.status in fine for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
