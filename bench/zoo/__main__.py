"""`python -m bench.zoo`: gates, closes, prunes and compares every model of the zoo.

A name may also be one that is in no list: timm/ or torchvision/ and a model, transformers/ and a
configuration's class or a model type, diffusers/ and a model's class. The last two become small.

Each model has a process of its own. What has been measured from the same commit stays, so that an
interrupted run goes on where it was. Exit code: 0 if every model ran and is equal, else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import ROOT, report
from bench.zoo.held_out import HELD_OUT
from bench.zoo.measure import Result
from bench.zoo.models import ZOO
from bench.zoo.names import check, library_of
from bench.zoo.process import row_of
from bench.zoo.table import LIBRARIES, as_csv, as_json, markdown

EQUAL = {"error_float64": 1e-10, "error_float32": 1e-5}
"""The largest relative errors of a model that counts as the same function."""
TITLES = {"zoo": "The zoo", "held_out": "The held-out models"}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="models or libraries, for example timm (all)")
    parser.add_argument("--held-out", action="store_true", help="the held-out list, not the zoo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each model")
    parser.add_argument("--untimed", action="store_true", help="leave latencies out")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "zoo")
    parser.add_argument("--keep", action="store_true", help="keep the rows of other commits, too")
    parser.add_argument("--list", action="store_true", help="only list the models")
    arguments = parser.parse_args(argv)
    listed = HELD_OUT if arguments.held_out else tuple(ZOO)
    arguments.models = [model for model in listed if _fits(model, arguments.names)]
    for name in arguments.names:
        if not any(_fits(model, [name]) for model in listed):
            try:
                check(name)
            except ValueError as error:
                parser.error(str(error))
            arguments.models.append(name)
    return arguments


def _fits(model: str, names: Sequence[str]) -> bool:
    return not names or any(model == name or model.startswith(f"{name}/") for name in names)


def _measured(path: Path, commit: str, arguments: argparse.Namespace) -> dict[str, Result]:
    """Rows of an earlier run: of the same commit, or of models that are not asked for now."""
    if not path.is_file():
        return {}
    rows = [Result(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    clean = commit != "unknown" and not commit.endswith("-dirty")
    return {
        row.name: row
        for row in rows
        if row.seed == arguments.seed
        and (
            (clean and row.commit == commit and not row.failure)
            or (arguments.keep and row.name not in arguments.models)
        )
    }


def _one(name: str, arguments: argparse.Namespace) -> Result:
    library = library_of(name)
    if importlib.util.find_spec(library) is None:
        return Result(name, arguments.seed, f"{library} is not installed (pip install .[zoo])")
    mode = "untimed" if arguments.untimed else "timed"
    options = [name, str(arguments.seed), mode]
    entries: dict[str, Any] = {"name": name, "seed": arguments.seed}
    return Result(**entries | row_of("bench.zoo.measure", options, arguments.limit))


def _equal(row: Result) -> bool:
    return not row.failure and all(getattr(row, name) <= most for name, most in EQUAL.items())


def _says(row: Result) -> str:
    if row.failure:
        return f"FAILED: {row.failure}"
    share = f"{row.gone / row.dead:.1%} of what is dead is gone" if row.dead else "nothing is dead"
    gated, weights = row.weights
    left = f"{row.params[0] / row.params[1]:.1%} of the parameters left"
    error = "" if _equal(row) else f", ERROR {row.error_float64:.2g}, {row.error_float32:.2g}"
    layers = f"{row.gated} of {row.layers} layers gated ({gated / weights:.1%} of the weights)"
    return f"{layers}, {share}, {left}{error}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    names: list[str] = arguments.models
    if arguments.list:
        print("\n".join(names))
        return 0
    words = ["python", "-m", "bench.zoo", *arguments.names]
    words += [f"--seed={arguments.seed}"] if arguments.seed else []
    words += ["--held-out"] if arguments.held_out else []
    words += ["--untimed"] if arguments.untimed else []
    words += ["--keep"] if arguments.keep else []
    about = report.facts(shlex.join(words), 1, tested=False) | {
        library: report.version(library) for library in LIBRARIES
    }
    out, stem = arguments.out, "held_out" if arguments.held_out else "zoo"
    out.mkdir(parents=True, exist_ok=True)
    rows = _measured(out / f"{stem}.json", str(about["commit"]), arguments)
    for name in names:
        if name not in rows:
            rows[name] = replace(_one(name, arguments), commit=str(about["commit"]))
        print(f"{name}: {_says(rows[name])}", flush=True)
        order = HELD_OUT if arguments.held_out else tuple(ZOO)
        done = [rows[known] for known in dict.fromkeys([*order, *rows]) if known in rows]
        (out / f"{stem}.json").write_text(as_json(done, about), encoding="utf-8")
        (out / f"{stem}.csv").write_text(as_csv(done), encoding="utf-8")
        (out / f"{stem}.md").write_text(markdown(done, about, TITLES[stem]), encoding="utf-8")
    print(f"{stem}.md, {stem}.csv, {stem}.json in {out}")
    return 0 if all(_equal(rows[name]) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
