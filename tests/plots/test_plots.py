"""The picture of a training: every curve is there, readable, and what the metrics say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from l0fast._files import write_atomically
from l0fast.plots import dynamics
from tests.helpers.histories import LAYERS, history
from tests.helpers.thinned import telling, thinned


def targets(kind: str, layers: dict[str, int] = LAYERS) -> dict[str, float] | None:
    if kind == "layers":
        return {name: 0.2 + 0.1 * (i % 6) for i, name in enumerate(layers)}
    return {"model": 0.3} if kind in ("model", "params") else None


def summary(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "dataset": "digits",
        "model": "lenet5",
        "seed": 3,
        "test_error_percent": 2.345,
        "architecture": None,
    }
    if kind != "dense":
        found |= {"realised_density": 0.2987, "architecture": "20-21-34-407", "measure": "gates"}
    if kind == "params":
        found |= {"measure": "params", "params_fraction": 0.2345}
    return found


KINDS = ["model", "layers", "params", "penalty", "dense"]


def points(axis: Axes) -> list[tuple[list[float], list[float]]]:
    """x and y of each line."""
    data = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axis.lines]
    return [(x.tolist(), y.tolist()) for x, y in data]


def draw(kind: str, epochs: int = 30, layers: dict[str, int] = LAYERS) -> bytes:
    stream: Any = io.BytesIO()
    rows = history(epochs, kind, layers)
    dynamics.plot_dynamics(rows, targets(kind, layers), summary(kind), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("kind", "epochs"), thinned([("model", 1), ("layers", 30), ("penalty", 30), ("dense", 1)], 3)
)
def test_it_is_a_picture(kind: str, epochs: int, tmp_path: Path) -> None:
    path = tmp_path / "dynamics.png"
    rows = history(epochs, kind)
    drawn = rows, targets(kind), summary(kind)
    write_atomically(path, lambda part: dynamics.plot_dynamics(*drawn, part))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] >= 1000
        assert image.size[1] >= 700
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors is not None
        # No empty canvas, nor one of text alone.
        tones = [(count, color) for count, color in colors if isinstance(color, tuple)]
        assert len({color for count, color in tones if len(set(color)) > 1 and count > 20}) > 2


@pytest.mark.parametrize("kind", telling(KINDS, ["layers", "params"]))
def test_the_curves_are_the_metrics(kind: str, figures: list[Figure]) -> None:
    draw(kind)
    rows = history(30, kind)
    found = [y for axis in figures[0].axes for x, y in points(axis) if len(x) == 30]
    names = ["train_error_percent", "validation_error_percent", "test_error_percent"]
    wanted = [[row[name] for row in rows] for name in names]
    if kind == "model":
        wanted += [[row[n] for row in rows] for n in ("expected_density", "realised_density")]
    if kind == "layers":
        wanted += [[row["density"][name] for row in rows] for name in LAYERS]
    if kind == "params":
        wanted += [[row["density"]["model"] for row in rows]]
    if kind in ("model", "layers", "params"):
        wanted += [[row["lambda"][name] for row in rows] for name in rows[0]["lambda"]]
    if kind != "dense":
        wanted += [[r["layers"][n]["kept"] / size for r in rows] for n, size in LAYERS.items()]
    for values in wanted:
        assert any(values == pytest.approx(curve) for curve in found)
    levels = {y[0] for _, y in points(figures[0].axes[0]) if len(set(y)) == 1}
    assert levels >= set((targets(kind) or {}).values())


@pytest.mark.parametrize(
    ("kind", "pruned"), telling([("model", 0.2987), ("params", 0.2345)], [("params", 0.2345)])
)
def test_the_measure_names_the_density_and_the_result(
    kind: str, pruned: float, figures: list[Figure]
) -> None:
    draw(kind)
    axis = figures[0].axes[0]
    assert axis.get_title() == ("density (params)" if kind == "params" else "density")
    assert ([30.0], [pruned]) in points(axis)


def test_restarts_are_marked(figures: list[Figure]) -> None:
    draw("layers")
    axis = next(axis for axis in figures[0].axes if "lambda" in axis.get_title())
    lines = [line for line in axis.lines if line.get_marker() == "v"]
    marked = [np.asarray(line.get_xdata()).tolist() for line in lines]
    assert marked[:-1] == [[7, 14, 21, 28]] * 4
    assert marked[-1] == []  # for the legend


MANY = {f"transformer.blocks.{i}.mlp.linear_in": 100 + i for i in range(30)}


@pytest.mark.parametrize(
    ("kind", "layers"),
    [*telling([(kind, LAYERS) for kind in KINDS], [("dense", LAYERS)]), ("layers", MANY)],
)
def test_no_text_lies_on_another_or_outside(
    kind: str, layers: dict[str, int], figures: list[Figure]
) -> None:
    draw(kind, 30, layers)
    figure = figures[0]
    figure.draw_without_rendering()  # places all for the figure's own resolution
    renderer: Any = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    canvas = figure.bbox
    boxes: list[tuple[str, Any]] = []
    for axis in figure.axes:
        axis_boxes: list[tuple[str, Any]] = [("title", axis.title), ("xlabel", axis.xaxis.label)]
        boxes.append((f"{axis.get_title()} panel", axis.bbox))
        legend = axis.get_legend()
        if legend is not None:
            axis_boxes.append(("legend", legend))
            assert len(legend.get_texts()) > 0
        boxes += [(f"{axis.get_title()} {n}", a.get_window_extent(renderer)) for n, a in axis_boxes]
    for index, (name, box) in enumerate(boxes):
        assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1, name
        assert canvas.y0 <= box.y0 < box.y1 <= canvas.y1, name
        for other, second in boxes[index + 1 :]:
            assert not box.overlaps(second), (name, other)


def test_colours_and_line_styles_tell_curves_apart(figures: list[Figure]) -> None:
    """Each curve of a panel has a style of its own, also with more layers than colours."""
    layers = {f"block{i}.linear": 100 + i for i in range(24)}
    draw("layers", 30, layers)
    for axis in figures[0].axes:
        curves = [line for line in axis.lines if np.size(line.get_xdata()) == 30]
        styles = [(line.get_color(), line.get_linestyle()) for line in curves]
        assert len(set(styles)) == len(styles), axis.get_title()
