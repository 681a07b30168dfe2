"""The rows as a table: errors at equal size, and the default compared with the best other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.quality.methods import DEFAULT, DENSE, METHODS, PENALISED
from bench.quality.tasks import FINE_TUNED
from bench.report import Facts

Row = dict[str, Any]
FAILED = "layer closed"
PENALISED_BEST = "penalised L0, best of 3"


class Cell(NamedTuple):
    """The test errors of one method at one place, in percent."""

    mean: float
    error: float
    """Standard error of the mean; NaN of one seed."""
    collapsed: int
    """Runs that ended with a layer through which nothing passes."""
    runs: int

    def __str__(self) -> str:
        text = f"{self.mean:.1f}"
        if not math.isnan(self.error):
            text += f" ± {self.error:.1f}"
        return text + (f" ({self.collapsed} x {FAILED})" if self.collapsed else "")


Place = tuple[str, str, float]
"""Task, length, target."""


def cell(rows: Sequence[Row]) -> Cell:
    """Of rows that differ in their seeds alone."""
    tests = [row["test"] for row in rows]
    spread = statistics.stdev(tests) / math.sqrt(len(tests)) if len(tests) > 1 else math.nan
    collapsed = sum(bool(row["collapsed"]) for row in rows)
    return Cell(statistics.fmean(tests), spread, collapsed, len(rows))


def cells(rows: Iterable[Row]) -> dict[Place, dict[str, Cell]]:
    """Place -> method -> its cell; dense is shown at every target, and of the penalties the one
    with the least validation error."""
    found: dict[Place, dict[str, list[Row]]] = {}
    for row in rows:
        if "test" in row:
            place = (row["task"], row["length"], row["target"])
            found.setdefault(place, {}).setdefault(row["method"], []).append(row)
    shown: dict[Place, dict[str, Cell]] = {}
    for place, methods in found.items():
        task, length, target = place
        if target == 1:
            continue
        dense = found.get((task, length, 1.0), {})
        named = {**methods, **dense}
        penalised = [named.pop(name) for name in PENALISED if name in named]
        if penalised:
            named[PENALISED_BEST] = min(
                penalised, key=lambda rows: statistics.fmean(row["validation"] for row in rows)
            )
        shown[place] = {name: cell(rows) for name, rows in named.items()}
    return dict(sorted(shown.items(), key=lambda item: (item[0][0], item[0][1], -item[0][2])))


def ratios(shown: dict[Place, dict[str, Cell]], other: str | None = None) -> dict[Place, Cell]:
    """Place -> error of the default / that of `other`, or of the best method but the default and
    the dense one; with the standard error of that."""
    found: dict[Place, Cell] = {}
    for place, methods in shown.items():
        rest = {n: c for n, c in methods.items() if n not in (DEFAULT, DENSE)}
        if other is not None:
            rest = {n: c for n, c in rest.items() if n == other}
        if DEFAULT not in methods or not rest:
            continue
        own, best = methods[DEFAULT], min(rest.values(), key=lambda one: one.mean)
        ratio = own.mean / best.mean
        error = ratio * math.hypot(own.error / own.mean, best.error / best.mean)
        found[place] = Cell(ratio, error, own.collapsed, own.runs)
    return found


def geometric_mean(found: Iterable[Cell]) -> float:
    """Of ratios."""
    return math.exp(statistics.fmean(math.log(one.mean) for one in found))


def summary(shown: dict[Place, dict[str, Cell]], other: str | None) -> str:
    """How the default does beside another method, over all rows; empty without any."""
    found = ratios(shown, other)
    if not found:
        return ""
    worse = sum(
        one.mean > 1.05 + (0 if math.isnan(one.error) else one.error) for one in found.values()
    )
    below = sum(one.mean < 1 for one in found.values())
    return (
        f"{geometric_mean(found.values()):.2f} over {len(found)} rows, below 1 in {below}, above "
        f"1.05 by more than its standard error in {worse}"
    )


def kind(place: Place) -> str:
    """Of a row: its length, and whether it is a fine-tuning."""
    task, length, _ = place
    return f"{length}, fine-tuned" if task.endswith(FINE_TUNED) else length


def summaries(shown: dict[Place, dict[str, Cell]], others: dict[str, str | None]) -> list[str]:
    """A table of the ratios to `others` (title -> method), for each kind of row and for all."""
    kinds = {one: [place for place in shown if kind(place) == one] for one in map(kind, shown)}
    if len(kinds) > 1:
        kinds["all"] = list(shown)
    lines = ["| training | the default's error / that of | geometric mean |", "| --- " * 3 + "|"]
    for name, places in kinds.items():
        own = {place: shown[place] for place in places}
        for title, other in others.items():
            if text := summary(own, other):
                lines.append(f"| {name} | {title} | {text} |")
    return lines


def markdown(rows: Sequence[Row], about: Facts) -> str:
    """The whole page."""
    shown = cells(rows)
    order = [name for name in METHODS if name not in PENALISED]
    order.insert(order.index(DEFAULT), PENALISED_BEST)
    names = [name for name in order if any(name in methods for methods in shown.values())]
    lines = [
        "# Errors at equal size",
        "",
        "Test error in %, mean ± standard error over seeds 0, 1, ... The models of a row have at "
        "most that share of the parameters, after as many epochs. Fine-tuned: from one dense net; "
        "the small net from scratch has the epochs of both trainings. "
        f"`{about['command']}`, torch {about['torch']}, {about['cpu']}, one thread.",
        "",
        "| task | training | parameters | seeds | "
        + " | ".join(names)
        + " | default / best other |",
        "| --- " * (len(names) + 5) + "|",
    ]
    against = ratios(shown)
    for place, methods in shown.items():
        task, length, target = place
        values = [str(methods.get(name, "")) for name in names]
        ratio = f"{against[place].mean:.2f}" if place in against else ""
        count = max(one.runs for name, one in methods.items() if name != DENSE)
        lines.append(
            f"| {task} | {length} | {target:.0%} | {count} | "
            + " | ".join(values)
            + f" | {ratio} |"
        )
    others = [name for name in names if name not in (DENSE, DEFAULT)]
    compared = {"the best other method": None, **{name: name for name in others}}
    return "\n".join([*lines, "", *summaries(shown, compared)]) + "\n"
