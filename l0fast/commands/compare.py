"""`l0fast compare`: several methods on the same data, epochs and seeds, as one table."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast._files import locked, write_text
from l0fast.commands import options, runs, values
from l0fast.commands.options import DEFAULTS
from l0fast.commands.runs import Run
from l0fast.training.folder import RunFolder
from l0fast.training.results import aggregate, markdown_table, text_table
from l0fast.training.settings import WITHOUT_GATES

Row = dict[str, Any]

WITHOUT_TARGET = {"density": None, "layer_density": None, "measure": "gates", "latency_table": None}

METHODS: dict[str, dict[str, Any]] = {
    "dense": {"dense": True, **WITHOUT_TARGET, **WITHOUT_GATES},
    "penalised": WITHOUT_TARGET,
    "magnitude": {"method": "magnitude"},
    "magnitude-one-shot": {"method": "magnitude-one-shot"},
    "constrained": {"method": "l0"},
}
"""Method -> the options of `l0fast train` that it changes."""
DEFAULT = ("dense", "magnitude", "magnitude-one-shot", "constrained")
TABLE = "compare.md"
NUMBERS = "compare.json"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `l0fast compare`: those of a training, and some of its own."""
    options.add_training(parser)
    add = parser.add_argument
    names = ", ".join(METHODS)
    add(
        "--methods",
        metavar="A,B",
        help=f"which of {names} to compare; default: all, but penalised only with --penalty",
    )
    add("--seeds", default="0-2", metavar="A-B", help="default: 0-2; in place of --seed")
    add("--only", metavar="A,B", help="patterns of runs to train, such as 'magnitude-*'")
    parser.set_defaults(out="runs/compare")


def compare(args: argparse.Namespace) -> int:
    """Trains the runs that are not done yet, and writes the table."""
    values.check(args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _checks.refuse(
            "compare", "several processes", "one process (`l0fast train` can use several)"
        )
    every = plan(args)
    chosen = runs.select(every, args.only)
    out = Path(args.out)
    RunFolder(out).check()
    done = runs.finished(every, out)

    def rows() -> list[Row]:
        return [aggregate(name, some) for name, some in runs.by_row(every, done).items()]

    def write() -> None:
        title = f"# {args.model} on {values.dataset(args)[0]}\n"
        with locked(out):  # other processes may train other runs of this table and write it
            done.update(runs.finished(every, out))
            write_text(out / TABLE, f"{title}\n{markdown_table(rows())}")
            named = {run.name: done[run.name] for run in every if run.name in done}
            numbers = {"rows": rows(), "runs": named}
            write_text(out / NUMBERS, json.dumps(numbers, indent=2) + "\n")

    out.mkdir(parents=True, exist_ok=True)
    runs.train_all(chosen, out, done, args.quiet, write)
    write()
    print(text_table(rows()))
    print(f"\n{len(done)} of {len(every)} runs are done; {out / TABLE}, {out / NUMBERS}")
    return 0


def plan(args: argparse.Namespace) -> list[Run]:
    """Lists every training of the table.

    Raises:
        ValueError: a method is unknown, or the target or penalty of a method is missing or is not
            needed.
    """
    names = list(DEFAULT) + (["penalised"] if args.penalty is not None else [])
    if args.methods is not None:
        names = args.methods.split(",")
    for name in names:
        _checks.one_of("methods", name, tuple(METHODS))
    if len(set(names)) < len(names):
        _checks.refuse("methods", args.methods, "each method once")
    if args.layer_density is not None and "=" not in args.layer_density:
        _checks.refuse("layer_density", args.layer_density, "NAME=DENSITY,...")
    if args.dense or args.compare_dense:
        _checks.refuse("dense", True, "--methods dense,... in its place")
    if args.method != DEFAULTS.method:
        _checks.refuse("method", args.method, f"--methods {args.method} in its place")
    if (args.penalty is not None) != ("penalised" in names):
        _checks.refuse(
            "penalty", args.penalty, "a --penalty and penalised among the methods, or neither"
        )
    shared = {name: value for name, value in vars(args).items() if name in vars(runs.words())}
    every: list[Run] = []
    for name in names:
        given = {"penalty": args.penalty if name == "penalised" else None} | METHODS[name]
        for seed in runs.seeds(args.seeds):
            every.append(Run(name, runs.words(**shared | given | {"seed": seed, "resume": True})))
    for run in every:
        values.asked(run.args)
    return every
