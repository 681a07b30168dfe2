"""Writes the tables and the figure: what the paper reported beside what was trained here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.poster.plan import CASES, RECIPES, SIZES, Case, row_name
from l0fast._files import write_atomically, write_text
from l0fast.commands import runs
from l0fast.commands.runs import Run
from l0fast.commands.values import number
from l0fast.training.folder import METRICS
from l0fast.training.results import aggregate, markdown_table, text_table

Row = dict[str, Any]

TABLE = "poster.md"
NUMBERS = "poster.json"
FIGURE = "poster.png"
EXPLAINED = """\
Test errors are those of the pruned models at the end of training, means over seeds with
the standard deviation of the sample; of the authors' later runs, the last epoch's mean.
"Best" is the least test error of all seeds and epochs, as the publications report it.
Density: parameters of kept gates over gated parameters; params and MACs: of the pruned
models over the dense one's. Within: pruned models that meet what was asked.
"""


def as_text(every: Sequence[Run], done: Mapping[str, Row]) -> str:
    """Both tables, aligned for a terminal."""
    published, by_size = _rows(CASES, every, done), _rows(SIZES, every, done)
    return f"{text_table(published)}\n\nby size:\n\n{text_table(by_size)}"


def write(every: Sequence[Run], done: Mapping[str, Row], out: Path, epochs: int) -> None:
    """Writes the tables, the numbers, and the figure if a run in `out` has metrics.

    Args:
        every: all runs of the plan.
        done: name -> summary of the runs that are done.
        out: the folder to write to.
        epochs: of each run.
    """
    tables = {
        "The published table": _rows(CASES, every, done),
        "By size": _rows(SIZES, every, done),
    }
    missing = [run.name for run in every if run.name not in done]
    dataset = every[0].args.dataset
    lines = [f"# The poster's table, reproduced ({dataset}, {epochs} epochs)\n"]
    for title, rows in tables.items():
        lines += [f"## {title}\n", markdown_table(rows)]
    lines += [EXPLAINED, f"{len(done)} of {len(every)} runs are done.\n"]
    if missing:
        lines.append("Missing: " + ", ".join(missing) + ".\n")
    write_text(out / TABLE, "\n".join(lines))
    named = {run.name: done[run.name] for run in every if run.name in done}
    numbers = {"tables": tables, "runs": named, "missing": missing}
    write_text(out / NUMBERS, json.dumps(numbers, indent=2) + "\n")
    _draw(every, out)


def _rows(cases: Sequence[Case], every: Sequence[Run], done: Mapping[str, Row]) -> list[Row]:
    """The rows of a table: for each case the published rows, then ours that have a finished run."""
    found = runs.by_row(every, done)
    rows: list[Row] = []
    for case in cases:
        rows += [row | {"name": f"{case.title}: {row['name']}"} for row in case.published]
        for recipe in case.recipes:
            summaries = found.get(row_name(case, recipe))
            if summaries:
                rows.append(aggregate(f"{case.title}: {RECIPES[recipe].title}", summaries))
    return rows


def _draw(every: Sequence[Run], out: Path) -> None:
    """Draws the figure, unless no run has metrics yet."""
    histories = {(case.model, case.what): _histories(case, every, out) for case in CASES}
    if not any(seeds for by_recipe in histories.values() for seeds in by_recipe.values()):
        return
    from bench.poster.plot import plot_poster  # matplotlib is loaded only where it draws

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
