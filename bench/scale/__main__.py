"""`python -m bench.scale`: time and memory of sparsify_, DensityConstraint and prune, by size.

Each model has a process of its own. Exit code: 0 if every model went through within its budgets, 1
if not, 2 if nothing could be started.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT, environment, report
from bench.scale.measure import Row, Step
from bench.scale.memory import GIB, resident
from bench.scale.models import MODELS, select
from bench.scale.plot import plot
from bench.scale.table import as_json, in_all, markdown, over_budget

POLL_S = 0.05
WORKER = (sys.executable, "-m", "bench.scale.measure")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--models", nargs="+", default=[], help="for example llama (all)")
    parser.add_argument("--max-params", type=float, default=math.inf, help="no larger models")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default 2)")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for each model")
    parser.add_argument(
        "--limit-gib", type=float, default=20.0, help="a process that takes more is ended"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "scale")
    parser.add_argument("--list", action="store_true", help="only list the models")
    arguments = parser.parse_args(argv)
    if arguments.threads < 1:
        parser.error(f"--threads: got {arguments.threads}; expected a whole number >= 1")
    return arguments


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats this run, without the folder of the results."""
    words = ["python", "-m", "bench.scale"]
    words += ["--models", *arguments.models] if arguments.models else []
    if arguments.max_params != math.inf:
        words.append(f"--max-params={arguments.max_params:g}")
    words += [f"--threads={arguments.threads}"] if arguments.threads != 2 else []
    return shlex.join(words)


def one(
    name: str, threads: int, limit_s: float, limit_gib: float, worker: Sequence[str] = WORKER
) -> Row:
    """Measures a model in its own process; ends the process if it takes too much."""
    with tempfile.TemporaryFile("w+") as answers, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [*worker, name], cwd=ROOT, env=environment(threads), stdout=answers, stderr=said
        )
        begin, why = time.monotonic(), ""
        try:
            while process.poll() is None and not why:
                if time.monotonic() - begin > limit_s:
                    why = f"did not end within {limit_s:g} s"
                elif (resident(process.pid) or 0) > limit_gib * GIB:
                    why = f"took more than {limit_gib:g} GiB"
                time.sleep(POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        for stream in (answers, said):
            stream.seek(0)
        rows = [line for line in answers.read().splitlines() if line.endswith("}")]
        row = Row(name)
        if rows:
            found = json.loads(rows[-1])
            row = Row(**found | {"steps": [Step(**step) for step in found["steps"]]})
        if process.returncode and not why:
            lines = said.read().strip().splitlines() or [""]
            why = f"ended with exit code {process.returncode} {lines[-1][:200]}".strip()
    row.failure = row.failure or why
    return row


def _says(row: Row) -> str:
    steps = ", ".join(
        f"{step.name} {step.seconds:.1f} s {step.peak / GIB:.2f} GiB" for step in row.steps
    )
    over = over_budget(row, MODELS[row.name])
    verdict = f"FAILED: {row.failure}" if row.failure else f"in all {in_all(row):.1f} s"
    return "; ".join([steps, verdict, *(f"OVER BUDGET: {what}" for what in over)])


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    try:
        names = select(arguments.models, arguments.max_params)
    except ValueError as error:
        print(f"bench.scale: {error}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(names))
        return 0
    about = report.facts(_command(arguments), arguments.threads, tested=False) | {
        library: report.version(library) for library in ("torchvision", "transformers")
    }
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in names:
        library = MODELS[name].library
        if importlib.util.find_spec(library) is None:
            row = Row(name, failure=f"{library} is not installed (pip install .[zoo])")
        else:
            row = one(name, arguments.threads, arguments.limit, arguments.limit_gib)
        rows.append(row)
        print(f"{name}: {_says(row)}", flush=True)
        (out / "scale.json").write_text(as_json(rows, MODELS, about), encoding="utf-8")
        (out / "scale.md").write_text(markdown(rows, MODELS, about), encoding="utf-8")
    title = f"{about['cpu']}, torch {about['torch']}, commit {about['commit']}, {about['date']}"
    picture = plot(rows, title, out)
    print(f"scale.md, scale.json{', scale.png' if picture else ''} in {out}")
    fine = all(not row.failure and not over_budget(row, MODELS[row.name]) for row in rows)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
