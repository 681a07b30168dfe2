"""scale.png: time and peak memory against parameters; matplotlib is loaded only here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.scale.measure import STEPS, Row, Step
from bench.scale.memory import GIB
from bench.scale.table import DENSE_TIMES, EXTRA_GIB, peak_budget

# Okabe and Ito's palette: can be told apart with any colour vision.
COLOURS = dict(zip(STEPS, ("#0072B2", "#E69F00", "#D55E00"), strict=True))
LINE = "llama/"
"""Models of one kind in several sizes are joined by a line, others stand alone."""


def _curves(axes: Any, rows: Sequence[Row], value: Callable[[Step], float]) -> None:
    for name in STEPS:
        points = [
            (row.name, row.params, value(step))
            for row in rows
            for step in row.steps
            if step.name == name
        ]
        line = [point[1:] for point in points if point[0].startswith(LINE)]
        if line:
            axes.plot(*zip(*line, strict=True), "o-", color=COLOURS[name], label=name)
        for title, params, height in points:
            if not title.startswith(LINE):
                axes.plot(params, height, "x", color=COLOURS[name])
                if name == STEPS[-1]:
                    short = title.rpartition("/")[2]
                    axes.annotate(
                        short, (params, height), xytext=(4, 4), fontsize=7,
                        textcoords="offset points",
                    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("parameters")
    axes.grid(alpha=0.3, which="both")


def plot(rows: Sequence[Row], title: str, out: Path) -> Path | None:
    """Draws both into out/scale.png; None where there is nothing to draw with, or to draw."""
    shown = sorted((row for row in rows if row.steps), key=lambda row: row.params)
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    times, peaks = figure.subplots(1, 2)
    _curves(times, shown, lambda step: step.seconds)
    times.set_ylabel("seconds")
    _curves(peaks, shown, lambda step: step.peak / GIB)
    budget = [peak_budget(row) / GIB for row in shown]
    label = f"budget: {DENSE_TIMES:g} x dense + {EXTRA_GIB:g} GiB"
    peaks.plot([row.params for row in shown], budget, "--", color="black", label=label)
    peaks.plot(
        [row.params for row in shown], [row.dense / GIB for row in shown], ":", color="grey",
        label="dense model",
    )  # fmt: skip
    peaks.set_ylabel("peak resident memory, GiB")
    peaks.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    path = out / "scale.png"
    figure.savefig(path, dpi=110)
    return path
