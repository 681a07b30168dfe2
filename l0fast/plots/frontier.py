"""The picture of a frontier: error against parameters, multiply-accumulates and latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l0fast._metrics import held_key, metric_of, title
from l0fast.measures.amounts import named
from l0fast.plots.dynamics import BLUE, GREY, canvas


def plot_frontier(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a point for each pruned model, in three panels.

    Args:
        rows: as returned by `frontier`.
        path: of the PNG file.
    """
    figure = canvas(14, 4.4)
    axes = figure.subplots(1, 3, sharey=True)
    names = ("params", "macs", "milliseconds")
    labels = ("parameters", "multiply-accumulates", "milliseconds a forward")
    metric = metric_of(rows[0])
    errors = [row[held_key(metric)] for row in rows]
    for axis, name, label in zip(axes, names, labels, strict=True):
        values = [row[name] for row in rows]
        full = rows[0][f"dense_{name}"]
        axis.plot(values, errors, color=BLUE, marker="o")
        for row, value, error in zip(rows, values, errors, strict=True):
            axis.annotate(
                named(row["target_density"]),
                (value, error),
                xytext=(6, 6),
                textcoords="offset points",
            )
        axis.axvline(full, color=GREY, ls="--", lw=1, label="dense")
        axis.set_xlabel(label)
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.legend(loc="upper right", frameon=False)
    axes[0].set_ylabel(f"test {title(metric)} of the pruned model")
    if min(errors) >= 0:
        axes[0].set_ylim(bottom=0, top=1.15 * max(errors) or 1)
    first = rows[0]
    head = f"{first.get('model', 'model')} on {first.get('dataset', 'data')}"
    figure.suptitle(f"{head}, seed {first['seed']}: targets of {first['measure']}, from one run")
    figure.savefig(path, format="png", dpi=120)
