"""The poster's figure: how density, multiplier and test error went during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from l0fast.plots.dynamics import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    VERMILLION,
    absent,
    canvas,
    logarithmic,
)

Rows = list[dict[str, Any]]

# The colour stands for the settings, the line style for the method.
METHODS = {"constrained": "-", "penalised": "--"}
COLORS = {"constrained": (SKY, BLUE, GREEN), "penalised": (ORANGE, VERMILLION)}


def _multiplier(row: Mapping[str, Any]) -> float | None:
    values = row.get("lambda")
    return None if values is None else max(values.values())


PANELS: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None]], ...] = (
    ("expected density", lambda row: row.get("expected_density")),
    ("multiplier $\\lambda$", _multiplier),
    ("test error (%)", lambda row: row["test_error_percent"]),
)


def plot_poster(
    histories: Mapping[tuple[str, str], Mapping[str, list[Rows]]],
    targets: Mapping[tuple[str, str], float | None],
    path: Path,
) -> None:
    """Draws a column for each model, with density, multiplier and test error over the epochs.

    A line is the mean over the seeds, its band goes from the least to the greatest. Where some
    seeds have more epochs than others, only the epochs that all seeds have are drawn.

    Args:
        histories: (model, method) -> settings -> metrics of each seed, perhaps of none; the
            method is "constrained" or "penalised".
        targets: (model, method) -> target density, if it has one.
        path: the PNG file to write.
    """
    models = list(dict.fromkeys(model for model, _ in histories))
    figure = canvas(5.2 * len(models) + 2.2, 9)
    counts: dict[str, dict[str, int]] = {}
    axes = figure.subplots(len(PANELS), len(models), sharex="col", squeeze=False)
    for (model, method), by_settings in histories.items():
        column = axes[:, models.index(model)]
        for (_, value), axis in zip(PANELS, column, strict=True):
            colors = COLORS[method][: len(by_settings)]
            for color, (settings, seeds) in zip(colors, by_settings.items(), strict=True):
                if not seeds:
                    continue
                label = f"{method}, {settings}"
                _band(axis, seeds, value, color=color, ls=METHODS[method], label=label)
                counts.setdefault(label, {})[model] = len(seeds)
        target = targets[model, method]
        if target is not None and any(by_settings.values()):
            column[0].axhline(target, color=BLACK, ls="-.", lw=1.2, label="target")
    for row, (title, _) in enumerate(PANELS):
        for column, model in enumerate(models):
            axis = axes[row][column]
            axis.grid(alpha=0.25)
            axis.set_ylabel(title if column == 0 else "")
            if row == 0:
                axis.set_title(model)
                axis.set_ylim(0, 1.03)
            if row == len(PANELS) - 1:
                axis.set_xlabel("epoch")
                axis.xaxis.get_major_locator().set_params(integer=True)
                if axis.lines and axis.dataLim.y0 > 0:
                    logarithmic(axis)
            if not axis.lines:
                absent(axis, "no run yet" if row != 1 else "no constrained run yet")
            elif row == 1:
                axis.set_ylim(bottom=0)
    _legend(figure, axes, models, counts)
    figure.savefig(path, format="png", dpi=120)


def _band(
    axis: Any,
    seeds: list[Rows],
    value: Callable[[Mapping[str, Any]], float | None],
    **style: Any,
) -> None:
    epochs = [row["epoch"] for row in min(seeds, key=len)]
    found = [[value(rows[i]) for rows in seeds] for i in range(len(epochs))]
    known = [[v for v in values if v is not None] for values in found]
    if not all(known):
        return
    middle = [sum(values) / len(values) for values in known]
    marker = {"marker": "o", "ms": 3} if len(epochs) == 1 else {}  # a point makes no line
    axis.plot(epochs, middle, **marker, **style)
    low, high = [min(values) for values in known], [max(values) for values in known]
    axis.fill_between(epochs, low, high, color=style["color"], alpha=0.18, lw=0)


def _legend(
    figure: Any, axes: Any, models: list[str], counts: Mapping[str, Mapping[str, int]]
) -> None:
    """One legend for all panels, below them; `counts`: label -> model -> number of seeds."""
    entries: dict[str, Any] = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        entries |= {label: handle for handle, label in zip(handles, labels, strict=True)}
    if entries:
        seeds = {
            label: ", ".join(str(of.get(model, 0)) for model in models)
            for label, of in counts.items()
        }
        figure.legend(
            entries.values(),
            [f"{label} ({seeds[label]})" if label in seeds else label for label in entries],
            title="mean and range over seeds (in brackets: how many, for each model)",
            loc="outside lower center",
            ncols=2,
            frameon=False,
        )
