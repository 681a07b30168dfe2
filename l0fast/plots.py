"""The picture of a training: density against its target, multipliers, errors, kept units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe and Ito's palette: told apart with any kind of colour vision; line styles say it again.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
STYLES = ("-", "--", "-.", ":")


def plot_dynamics(
    history: list[dict[str, Any]],
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    epochs = [row["epoch"] for row in history]
    gated = "expected_density" in history[0]
    _density(axes[0][0], epochs, history, targets, summary, gated)
    _multipliers(axes[0][1], epochs, history)
    _errors(axes[1][0], epochs, history, summary, gated)
    _kept(axes[1][1], epochs, history, gated)
    for axis in axes.flat:
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.25)
        axis.margins(x=0.02)
    figure.suptitle(_title(summary))
    figure.savefig(path, format="png", dpi=120)


def _title(summary: Mapping[str, Any]) -> str:
    head = f"{summary.get('model', 'model')} on {summary.get('dataset', 'data')}"
    parts = [head, f"seed {summary['seed']}"]
    if summary.get("architecture"):
        parts.append(f"pruned to {summary['architecture']}")
    parts.append(f"test error {summary['test_error_percent']:.2f} %")
    return ", ".join(parts)


def _absent(axis: Any, words: str) -> None:
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", va="center")


def _density(
    axis: Any,
    epochs: list[int],
    history: list[dict[str, Any]],
    targets: Mapping[str, float] | None,
    summary: Mapping[str, Any],
    gated: bool,
) -> None:
    axis.set_title("density")
    axis.set_ylim(0, 1.03)
    if not gated:
        _absent(axis, "dense: no gates")
        return
    expected = [row["expected_density"] for row in history]
    realised = [row["realised_density"] for row in history]
    axis.plot(epochs, expected, color=BLUE, label="expected")
    axis.plot(epochs, realised, color=VERMILLION, ls="--", label="realised (evaluation gates)")
    axis.plot(
        epochs[-1],
        summary["realised_density"],
        marker="o",
        ls="",
        color=BLACK,
        label=f"pruned: {summary['realised_density']:.4f}",
        clip_on=False,
        zorder=5,
    )
    for index, (name, target) in enumerate((targets or {}).items()):
        label = f"target {target:g}" + ("" if len(targets or {}) == 1 else f" ({name})")
        axis.axhline(target, color=BLACK, ls=STYLES[(index + 2) % 4], lw=1.2, label=label)
    axis.legend(loc="best")


def _multipliers(axis: Any, epochs: list[int], history: list[dict[str, Any]]) -> None:
    axis.set_title("multiplier $\\lambda$")
    if "lambda" not in history[0]:
        _absent(axis, "no constraint")
        return
    marked = False
    for index, name in enumerate(history[0]["lambda"]):
        values = [row["lambda"][name] for row in history]
        color = CYCLE[index % len(CYCLE)]
        axis.plot(epochs, values, color=color, ls=STYLES[index // len(CYCLE) % 4], label=name)
        before = [0, *(row["restarts"][name] for row in history[:-1])]
        now = [row["restarts"][name] for row in history]
        hits = [i for i, (a, b) in enumerate(zip(before, now, strict=True)) if b > a]
        if hits:
            axis.plot(
                [epochs[i] for i in hits],
                [values[i] for i in hits],
                marker="v",
                ls="",
                color=color,
                mec=BLACK,
                mew=0.5,
                label=None if marked else "epoch with dual restarts",
            )
            marked = True
    axis.set_ylim(bottom=0)
    axis.legend(loc="best")


def _errors(
    axis: Any,
    epochs: list[int],
    history: list[dict[str, Any]],
    summary: Mapping[str, Any],
    gated: bool,
) -> None:
    axis.set_title("error (%)")
    curves = (
        ("train_error_percent", "train (gates sampled)" if gated else "train", GREEN, ":"),
        ("validation_error_percent", "validation", ORANGE, "--"),
        ("test_error_percent", "test", BLUE, "-"),
    )
    for key, label, color, style in curves:
        if key in history[0]:
            axis.plot(epochs, [row[key] for row in history], color=color, ls=style, label=label)
    if gated:
        axis.plot(
            epochs[-1],
            summary["test_error_percent"],
            marker="o",
            ls="",
            color=BLACK,
            label=f"test, pruned: {summary['test_error_percent']:.2f} %",
            clip_on=False,
            zorder=5,
        )
    values = [row[key] for key, *_ in curves if key in history[0] for row in history]
    if min(values) > 0 and max(values) > 8 * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="y", which="minor", labelsize=7)
    axis.legend(loc="best")


def _kept(axis: Any, epochs: list[int], history: list[dict[str, Any]], gated: bool) -> None:
    axis.set_title("kept gates by layer")
    if not gated:
        _absent(axis, "dense: no gates")
        return
    for index, (name, layer) in enumerate(history[0]["layers"].items()):
        kept = [row["layers"][name]["kept"] / layer["of"] for row in history]
        last = history[-1]["layers"][name]["kept"]
        axis.plot(
            epochs,
            kept,
            color=CYCLE[index % len(CYCLE)],
            ls=STYLES[index % 4],
            label=f"{name}: {last} of {layer['of']}",
        )
    axis.set_ylim(0, 1.03)
    axis.set_ylabel("fraction")
    axis.legend(loc="best")
