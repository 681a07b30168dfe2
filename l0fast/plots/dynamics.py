"""The picture of a training: density against its target, multipliers, errors, kept units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l0fast._metrics import (
    held_key,
    in_words,
    metric_of,
    number,
    title,
    train_key,
    validation_key,
)

# Okabe and Ito's palette can be told apart with any colour vision; line styles differ as well.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#777777"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
STYLES = ("-", "--", "-.", ":")
LEGEND_ENTRIES = 16
NAME_LENGTH = 28

Rows = list[dict[str, Any]]


def canvas(width: float, height: float) -> Any:
    """An empty figure of this size in inches; it needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_dynamics(
    history: Rows,
    targets: Mapping[str, float] | None,
    summary: Mapping[str, Any],
    path: Path,
) -> None:
    """Draws four panels over the epochs and writes them as PNG to `path`.

    Args:
        history: rows of metrics, as in metrics.jsonl.
        targets: constraint -> target density; None without constraints.
        summary: as in summary.json.
        path: of the PNG file.
    """
    figure = canvas(14, 7.2)
    axes = figure.subplots(2, 2)
    gated = "expected_density" in history[0]
    _density(axes[0][0], history, targets or {}, summary)
    _multipliers(axes[0][1], history)
    _errors(axes[1][0], history, summary, gated)
    _kept(axes[1][1], history)
    last = history[-1]["epoch"]
    for axis in axes.flat:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.set_xlim(0, last * 1.02)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _legend(axis)
    figure.suptitle(_title(summary))
    figure.savefig(path, format="png", dpi=120)


def _title(summary: Mapping[str, Any]) -> str:
    head = f"{summary.get('model', 'model')} on {summary.get('dataset', 'data')}"
    parts = [head, f"seed {summary['seed']}"]
    if summary.get("architecture"):
        parts.append(f"pruned to {summary['architecture']}")
    metric = metric_of(summary)
    parts.append(f"test {in_words(metric, summary[held_key(metric)])}")
    return ", ".join(parts)


def _legend(axis: Any) -> None:
    """Puts the legend beside the panel, where it hides no curve."""
    handles, labels = axis.get_legend_handles_labels()
    if not handles:
        return
    more = len(handles) - LEGEND_ENTRIES
    axis.legend(
        handles[:LEGEND_ENTRIES],
        labels[:LEGEND_ENTRIES],
        title=f"(and {more} more)" if more > 0 else None,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
        frameon=False,
        fontsize=9 if len(handles) <= 10 else 7,
        title_fontsize=7,
        alignment="left",
    )


def _short(name: str) -> str:
    """The end of a long name."""
    return name if len(name) <= NAME_LENGTH else "…" + name[1 - NAME_LENGTH :]


def absent(axis: Any, words: str) -> None:
    """Writes into a panel why it is empty."""
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center")


def logarithmic(axis: Any) -> None:
    """Makes the y axis logarithmic, with labels at 1, 2 and 5, or at more if the range is short."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 6, 7, 8)
    axis.yaxis.set_major_locator(LogLocator(subs=subs))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _style(index: int) -> dict[str, Any]:
    """Colour and line style of curve `index`: neighbours differ in both, and 24 curves in one."""
    return {
        "color": CYCLE[index % len(CYCLE)],
        "ls": STYLES[(index + index // 12) % len(STYLES)],
    }


def _curve(axis: Any, history: Rows, values: list[float], **style: Any) -> None:
    # A single point is not a line, so it gets a marker.
    marker = {"marker": "o", "ms": 3} if len(history) == 1 else {}
    axis.plot([row["epoch"] for row in history], values, **marker, **style)


def _result(axis: Any, history: Rows, value: float, label: str) -> None:
    """Marks the value of the pruned model at the last epoch."""
    at = [history[-1]["epoch"]]
    axis.plot(at, [value], marker="o", ls="", color=BLACK, label=label, clip_on=False, zorder=5)


def _density(
    axis: Any, history: Rows, targets: Mapping[str, float], summary: Mapping[str, Any]
) -> None:
    measure = summary.get("measure", "gates")
    axis.set_title("density" if measure == "gates" else f"density ({measure})")
    axis.set_ylim(0, 1.03)
    if "expected_density" not in history[0]:
        absent(axis, "dense: no gates")
        return
    expected = [row["expected_density"] for row in history]
    value = summary["realised_density"]
    if measure != "gates":
        value = summary[f"{measure}_fraction"]
    if len(targets) > 1:
        for index, (name, target) in enumerate(targets.items()):
            style = _style(index)
            if len(targets) <= len(CYCLE):
                style["ls"] = "-"
            label = f"{_short(name)}, target {target:g}"
            _curve(axis, history, [row["density"][name] for row in history], label=label, **style)
            axis.axhline(target, color=style["color"], ls=(0, (1, 2)), lw=1)
        _curve(
            axis, history, expected, color=GREY, ls=(0, (5, 1)), lw=1, label="whole model, gates"
        )
    elif measure != "gates":
        (target,) = targets.items()
        shares = [row["density"][target[0]] for row in history]
        _curve(axis, history, shares, color=BLUE, label=f"expected {measure}")
        _curve(axis, history, expected, color=GREY, ls=(0, (5, 1)), lw=1, label="expected gates")
        axis.axhline(target[1], color=BLACK, ls="-.", lw=1.2, label=f"target {target[1]:g}")
    else:
        realised = [row["realised_density"] for row in history]
        _curve(axis, history, expected, color=BLUE, label="expected")
        label = "realised\n(evaluation gates)"
        _curve(axis, history, realised, color=VERMILLION, ls="--", label=label)
        for target in targets.values():
            axis.axhline(target, color=BLACK, ls="-.", lw=1.2, label=f"target {target:g}")
    _result(axis, history, value, f"pruned: {value:.4f}")


def _multipliers(axis: Any, history: Rows) -> None:
    axis.set_title("multiplier $\\lambda$")
    if "lambda" not in history[0]:
        absent(axis, "no constraint")
        return
    restarted = False
    for index, name in enumerate(history[0]["lambda"]):
        values = [row["lambda"][name] for row in history]
        _curve(axis, history, values, label=_short(name), **_style(index))
        counts = [0, *(row["restarts"][name] for row in history)]
        hits = [i for i in range(len(history)) if counts[i + 1] > counts[i]]
        if hits:
            axis.plot(
                [history[i]["epoch"] for i in hits],
                [values[i] for i in hits],
                marker="v",
                ls="",
                color=CYCLE[index % len(CYCLE)],
                mec=BLACK,
                mew=0.5,
                clip_on=False,
                zorder=4,
            )
            restarted = True
    if restarted:
        label = "epoch with\ndual restarts"
        axis.plot([], [], marker="v", ls="", color=GREY, mec=BLACK, mew=0.5, label=label)
    axis.set_ylim(bottom=0)


def _errors(axis: Any, history: Rows, summary: Mapping[str, Any], gated: bool) -> None:
    metric = metric_of(summary)
    axis.set_title(title(metric))
    curves = (
        (train_key(metric), "train\n(gates sampled)" if gated else "train", GREEN, ":"),
        (validation_key(metric), "validation", ORANGE, "--"),
        (held_key(metric), "test", BLUE, "-"),
    )
    values: list[float] = []
    for key, label, color, style in curves:
        if key in history[0]:
            one = [row[key] for row in history]
            _curve(axis, history, one, color=color, ls=style, label=label)
            values += one
    if gated:
        error = summary[held_key(metric)]
        _result(axis, history, error, f"test, pruned:\n{number(metric, error)}")
        values.append(error)
    if min(values) > 0 and max(values) > 8 * min(values):
        logarithmic(axis)
    elif min(values) >= 0:
        axis.set_ylim(bottom=0)


def _kept(axis: Any, history: Rows) -> None:
    axis.set_title("kept gates by layer")
    if "layers" not in history[0]:
        absent(axis, "dense: no gates")
        return
    for index, (name, layer) in enumerate(history[0]["layers"].items()):
        kept = [row["layers"][name]["kept"] / layer["of"] for row in history]
        label = f"{_short(name)}: {history[-1]['layers'][name]['kept']} of {layer['of']}"
        _curve(axis, history, kept, label=label, **_style(index))
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("fraction")
