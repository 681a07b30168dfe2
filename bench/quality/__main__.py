"""`python -m bench.quality`: which method makes the fewest errors at the same size?

Each row is one training. All methods of a task and target have the same parameters and epochs. Each
row is added to results.jsonl when it is finished. The same command goes on after an interruption,
and writes quality.md and quality.png of all rows in the file.
"""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, report
from bench.quality.methods import DEFAULT, DENSE, METHODS, SCRATCH, Run, train
from bench.quality.plot import draw
from bench.quality.table import cells, markdown
from bench.quality.tasks import LENGTHS, TASKS

TARGETS = (0.5, 0.2, 0.1, 0.05)
KEY = ("task", "length", "target", "method", "seed")


def runs(arguments: argparse.Namespace) -> Iterator[Run]:
    """All runs, seed by seed. "from scratch" is trained with the default, since it has its shape.
    The dense model has a target of 1."""
    for seed in range(arguments.seeds):
        for length in arguments.lengths:
            for task in arguments.tasks:
                if DENSE in arguments.methods:
                    yield Run(task, length, 1.0, DENSE, seed)
                for target in arguments.targets:
                    for method in arguments.methods:
                        if method not in (DENSE, SCRATCH):
                            yield Run(task, length, target, method, seed)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of the file; a line that was cut off is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.endswith("}")]


def train_all(wanted: Sequence[Run], path: Path, data_root: str | None) -> list[dict[str, Any]]:
    """All rows of the file, after those of `wanted` that are not in it have been trained.

    A run that is refused has the reason in `error` and no numbers.
    """
    rows = read(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {tuple(row[name] for name in KEY) for row in rows}
    for number, run in enumerate(wanted, 1):
        if tuple(vars(run)[name] for name in KEY) in done:
            continue
        try:
            found = train(run, data_root)
        except ValueError as error:
            found = [{**vars(run), "error": " ".join(str(error).split())}]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in found))
        rows += found
        print(f"{number}/{len(wanted)} {found[0]}", flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["short"])
    parser.add_argument("--targets", nargs="+", type=float, default=list(TARGETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--data-root", help="torchvision's folder; L0FAST_DATA_ROOT by default")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "quality")
    arguments = parser.parse_args(argv)
    if SCRATCH in arguments.methods and DEFAULT not in arguments.methods:
        parser.error(f"--methods: {SCRATCH!r} has the shape of {DEFAULT!r}, which is missing")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", message="prune: closes")  # shows in the errors
    words = ["python", "-m", "bench.quality"]
    for name in ("seeds", "tasks", "lengths", "targets", "methods"):
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    about = report.facts(shlex.join(words), 1, tested=False)
    rows = train_all(list(runs(arguments)), arguments.out / "results.jsonl", arguments.data_root)
    (arguments.out / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "quality.md").write_text(markdown(rows, about), encoding="utf-8")
    draw(cells(rows), arguments.out / "quality.png")
    print(f"quality.md and quality.png in {arguments.out}")


if __name__ == "__main__":
    main()
