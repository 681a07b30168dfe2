"""The frontier of each method: error against size, a panel for each task and length."""

from __future__ import annotations

from pathlib import Path

from bench.quality.methods import DEFAULT, DENSE, METHODS, PENALISED
from bench.quality.table import PENALISED_BEST, Cell, Place
from l0fast.plots.dynamics import canvas, logarithmic

MOST_COLUMNS = 4
NAMES = (DEFAULT, *(name for name in METHODS if name not in (DEFAULT, *PENALISED)), PENALISED_BEST)
COLORS = {name: f"C{place}" for place, name in enumerate(NAMES)}


def draw(shown: dict[Place, dict[str, Cell]], path: Path) -> None:
    """Writes the picture."""
    panels = list(dict.fromkeys((task, length) for task, length, _ in shown))
    columns = min(len(panels), MOST_COLUMNS)
    rows = -(-len(panels) // columns)
    figure = canvas(4.6 * columns, 4.0 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (task, length) in zip(axes, panels, strict=False):
        own = {place[2]: methods for place, methods in shown.items() if place[:2] == (task, length)}
        for name in dict.fromkeys(name for methods in own.values() for name in methods):
            points = sorted(
                (100 * size, cells[name]) for size, cells in own.items() if name in cells
            )
            sizes, values = [size for size, _ in points], [one.mean for _, one in points]
            if name == DENSE:
                axis.axhline(values[0], color="grey", ls="--", lw=1, label=name)
                continue
            width = 2.5 if name == DEFAULT else 1.0
            color = COLORS[name]  # the same in all panels
            axis.plot(sizes, values, color=color, marker="o", ms=3, lw=width, label=name)
        axis.set_xscale("log")
        axis.set_xticks([100 * size for size in own if size < 1], minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter("{x:g}")
        logarithmic(axis)
        axis.set_title(f"{task}, {length}")
        axis.set_xlabel("parameters, % of the dense model's")
        axis.grid(alpha=0.25, which="both")
    for axis in axes[::columns]:
        axis.set_ylabel("test error, %")
    found = [axis.get_legend_handles_labels() for axis in axes]
    lines = {
        label: line
        for handles, labels in found
        for line, label in zip(handles, labels, strict=True)
    }
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
