"""`l0fast reproduce poster`: the published table and its figure, beside this project's."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast._files import write_atomically, write_text
from l0fast.commands import runs, values
from l0fast.commands.poster import CASES, RECIPES, SIZES, Case, plan, row_name
from l0fast.commands.runs import Run
from l0fast.commands.values import number
from l0fast.training.folder import METRICS
from l0fast.training.results import aggregate, markdown_table, text_table

Row = dict[str, Any]

EPOCHS = 200
TABLE = "poster.md"
NUMBERS = "poster.json"
FIGURE = "poster.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `l0fast reproduce`."""
    add = parser.add_argument
    add("what", metavar="WHAT", help="poster: the table and figure of the 2021 paper, on MNIST")
    add("--data-root", metavar="DIR", help="torchvision data; default: as in `l0fast train`")
    add("--dataset", default="mnist", help="mnist (the default), or another for a rehearsal")
    add("--out", default="runs/poster", metavar="DIR", help="a folder for each run goes into it")
    add("--seeds", default="0-4", metavar="A-B", help="default: 0-4")
    add("--epochs", default=EPOCHS, metavar="N", help=f"default: {EPOCHS}; fewer for a rehearsal")
    add("--only", metavar="A,B", help="patterns of runs to train, such as 'lenet5-*-seed-0'")
    add(
        "--have",
        action="append",
        default=[],
        metavar="DIR",
        help="take the runs whose summaries lie there as done (may be named several times)",
    )
    add("--list", action="store_true", help="train nothing: say what is done, write the tables")
    add("--skip", default="auto", help="as in `l0fast train`")
    add("--threads", metavar="N", help="CPU threads")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--quiet", action="store_true", help="no progress bar")


def reproduce(args: argparse.Namespace) -> int:
    """Trains what is not done yet, and writes the tables and the figure of what is."""
    _checks.one_of("what", args.what, ("poster",))
    shared = {
        name: getattr(args, name) for name in ("data_root", "dataset", "skip", "threads", "device")
    }
    epochs = _checks.whole("epochs", number("epochs", args.epochs, int))
    every = plan(runs.seeds(args.seeds), shared | {"epochs": epochs})
    values.check(every[0].args)
    chosen = runs.select(every, args.only)
    done = runs.finished(every, Path(args.out), runs.found_in(args.have))
    out = Path(args.out)

    def write() -> None:
        _write(every, done, out, epochs)

    out.mkdir(parents=True, exist_ok=True)
    if args.list:
        for run in chosen:
            print(f"{'done' if run.name in done else 'to do':<6} {run.name}")
    else:
        runs.train_all(chosen, out, done, args.quiet, write)
    write()
    print(text_table(_rows(CASES, every, done)))
    print(f"\nby size:\n\n{text_table(_rows(SIZES, every, done))}")
    print(f"\n{len(done)} of {len(every)} runs are done; {out / TABLE}, {out / NUMBERS}", end="")
    print(f", {out / FIGURE}" if (out / FIGURE).exists() else "")
    return 0


def _rows(cases: Sequence[Case], every: Sequence[Run], done: Mapping[str, Row]) -> list[Row]:
    """The rows of a table: of each case the published ones, then ours as far as they are done."""
    found = runs.by_row(every, done)
    rows: list[Row] = []
    for case in cases:
        rows += [row | {"name": f"{case.title}: {row['name']}"} for row in case.published]
        for recipe in case.recipes:
            summaries = found.get(row_name(case, recipe))
            if summaries:
                rows.append(aggregate(f"{case.title}: {RECIPES[recipe].title}", summaries))
    return rows


def _write(every: Sequence[Run], done: Mapping[str, Row], out: Path, epochs: int) -> None:
    tables = {
        "The published table": _rows(CASES, every, done),
        "By size": _rows(SIZES, every, done),
    }
    missing = [run.name for run in every if run.name not in done]
    dataset = every[0].args.dataset
    lines = [f"# The poster's table, reproduced ({dataset}, {epochs} epochs)\n"]
    for title, rows in tables.items():
        lines += [f"## {title}\n", markdown_table(rows)]
    lines.append(
        "Test errors are those of the pruned models at the end of training, means over seeds with\n"
        "the standard deviation of the sample; of the authors' later runs, the last epoch's mean.\n"
        '"Best" is the least test error of all seeds and epochs, as the publications report it.\n'
        "Density: parameters of kept gates over gated parameters; params and MACs: of the pruned\n"
        "models over the dense one's. Within: pruned models that meet what was asked.\n"
    )
    lines.append(f"{len(done)} of {len(every)} runs are done.\n")
    if missing:
        lines.append("Missing: " + ", ".join(missing) + ".\n")
    write_text(out / TABLE, "\n".join(lines))
    numbers = {"tables": tables, "runs": dict(done), "missing": missing}
    write_text(out / NUMBERS, json.dumps(numbers, indent=2) + "\n")
    histories = {(case.model, case.what): _histories(case, every, out) for case in CASES}
    if any(seeds for by_settings in histories.values() for seeds in by_settings.values()):
        from l0fast.plots.poster import plot_poster

        targets = {
            (case.model, case.what): number("density", case.words.get("density")) for case in CASES
        }
        write_atomically(out / FIGURE, lambda path: plot_poster(histories, targets, path))


def _histories(case: Case, every: Sequence[Run], out: Path) -> dict[str, list[list[Row]]]:
    """Recipe -> the metrics of each of its runs that has some."""
    found: dict[str, list[list[Row]]] = {RECIPES[recipe].title: [] for recipe in case.recipes}
    for recipe in case.recipes:
        for run in every:
            path = run.folder(out) / METRICS
            if run.row == row_name(case, recipe) and path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                if lines:
                    rows = [json.loads(line) for line in lines]
                    found[RECIPES[recipe].title].append(rows)
    return found
