"""results.png: every ratio with its spread, and the goals; matplotlib is loaded only here."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.registry import stem
from bench.report import Row

# Okabe and Ito's palette: can be told apart with any colour vision.
REACHED, MISSED, PLAIN = "#009E73", "#D55E00", "#0072B2"


def _bars(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        low, middle, high = row.ratio_p25, row.ratio_p50, row.ratio_p75
        assert low is not None
        assert middle is not None
        assert high is not None
        colour = {True: REACHED, False: MISSED, None: PLAIN}[row.reached]
        marker = "X" if row.reached is False else "o"
        axes.plot([low, high], [place, place], color=colour, linewidth=3, alpha=0.5)
        axes.plot(middle, place, marker, color=colour, markersize=6)
    labels = [
        f"{row.case.partition('/')[2]}: {row.variant} / {row.baseline}"
        + (f"   [{row.goal}]" if row.goal else "")
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    low, high = axes.get_xlim()
    if high / low < 12:  # else there are powers of ten to read
        axes.xaxis.set_minor_formatter("{x:g}x")
    axes.grid(axis="x", alpha=0.3)


def plot(rows: Sequence[Row], title: str, out: Path) -> Path | None:
    """Draws the time ratios into out/results.png; None where there is nothing to draw with, or
    nothing to draw."""
    shown = [row for row in rows if row.ratio_p50 is not None]
    if not shown or importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[str, list[Row]] = {}
    for row in shown:
        groups.setdefault(stem(row.case), []).append(row)
    heights = [len(group) + 3 for group in groups.values()]
    figure = Figure(figsize=(11, 0.2 * sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    for axes, (name, group) in zip(panels[:, 0], groups.items(), strict=True):
        _bars(axes, group)
        axes.set_title(name, loc="left", fontsize=9)
    panels[-1, 0].set_xlabel(
        "time / baseline's time, median and quartiles of side-by-side samples; "
        "green: goal reached, cross: not reached",
        fontsize=8,
    )
    figure.suptitle(title, fontsize=9)
    path = out / "results.png"
    figure.savefig(path, dpi=110)
    return path
