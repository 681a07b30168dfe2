"""How long each layer of a model takes at each width, on one device: a table, measured once."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from l0fast import _checks
from l0fast._files import read_text, write_text

FORMAT = 1


@dataclass(frozen=True)
class LayerLatency:
    """One layer: seconds for one forward of the example, at a grid of widths."""

    inputs: list[int]
    """Ascending; the last is the layer's own."""
    outputs: list[int]
    seconds: list[list[float]]
    """[inputs][outputs]; it does not fall along either."""

    def __post_init__(self) -> None:
        cells = [cell for row in self.seconds for cell in row]
        shape = [len(self.inputs)] + [len(self.outputs)] * len(self.inputs)
        whole = [len(self.seconds), *(len(row) for row in self.seconds)] == shape
        rising = all(side == sorted(set(side)) for side in (self.inputs, self.outputs))
        if not (whole and rising and cells and all(0 <= cell < math.inf for cell in cells)):
            raise ValueError("a layer's table that contradicts itself")


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """The seconds that a model's layers take at several widths, as `measure_latency` returns them.

    Between the widths that were measured, seconds are interpolated bilinearly. Time outside of the
    layers that can shrink is part of the layers' seconds where it shrinks with their outputs, and
    part of `rest` where it does not.

    Attributes:
        layers: layer name -> LayerLatency(inputs, outputs, seconds): the widths on each side, and
            seconds[i][j] at inputs[i] and outputs[j].
        rest: seconds that do not depend on the widths.
        about: where it was measured: device, threads, dtype, shapes of the example, torch version.
    """

    layers: dict[str, LayerLatency]
    rest: float
    about: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """A dict of what JSON knows, which `from_json` takes, bit for bit."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> LatencyTable:
        """The table of such a dict.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}, not {FORMAT}")
        rest = _checks.number("rest", state["rest"], "seconds >= 0", low=0.0)
        layers = {name: LayerLatency(**layer) for name, layer in state["layers"].items()}
        return cls(layers, rest, dict(state["about"]))

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON."""
        write_text(Path(path), json.dumps(self.as_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path, name: str = "path") -> LatencyTable:
        """The table in a file that `save` wrote; `name` is the option that named it.

        Raises:
            ValueError: the file holds no latency table.
            OSError: the file cannot be read.
        """
        try:
            return cls.from_json(json.loads(read_text(Path(path))))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"a latency table that save wrote ({type(error).__name__}: {error})"
            _checks.refuse(name, str(path), reason)

    def under(self, prefix: str) -> LatencyTable:
        """The same table for a model that has this one's as the part `prefix` (with its dot)."""
        layers = {prefix + name: layer for name, layer in self.layers.items()}
        return LatencyTable(layers, self.rest, self.about)


class Grids(NamedTuple):
    """The tables of L layers as tensors, all as large as the largest."""

    inputs: Tensor
    """[L, G] widths, ascending."""
    outputs: Tensor
    """[L, H]"""
    seconds: Tensor
    """[L, G, H]"""

    @classmethod
    def of(cls, layers: list[LayerLatency]) -> Grids:
        """Smaller tables go on with widths that do not exist, at what the largest costs."""

        def ascending(widths: list[int], size: int) -> list[int]:
            return [*widths, *range(widths[-1] + 1, widths[-1] + 1 + size - len(widths))]

        def last(row: list[Any], size: int) -> list[Any]:
            return [*row, *[row[-1]] * (size - len(row))]

        rows = max(2, *(len(layer.inputs) for layer in layers))
        columns = max(2, *(len(layer.outputs) for layer in layers))
        return cls(
            *(
                torch.tensor(part, dtype=torch.float64)
                for part in (
                    [ascending(layer.inputs, rows) for layer in layers],
                    [ascending(layer.outputs, columns) for layer in layers],
                    [last([last(row, columns) for row in lr.seconds], rows) for lr in layers],
                )
            )
        )

    def at(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """[L] seconds at some widths ([L] each), bilinear and differentiable in them."""
        row, down = _place(self.inputs, inputs)
        column, right = _place(self.outputs, outputs)
        layer = torch.arange(len(row), device=row.device)
        corners = [
            (self.seconds[layer, r, column], self.seconds[layer, r, column + 1])
            for r in (row, row + 1)
        ]
        # Not lerp, which takes one dtype alone.
        upper, lower = (left * (1 - right) + other * right for left, other in corners)
        return upper * (1 - down) + lower * down


def _place(grid: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """[L] the interval of a grid that each width lies in, and how far in it, in [0, 1]."""
    with torch.no_grad():
        index = torch.searchsorted(grid, widths[:, None].contiguous(), right=True) - 1
        index = index.clamp_(0, grid.shape[1] - 2)
    low, high = grid.gather(1, index), grid.gather(1, index + 1)
    return index[:, 0], ((widths[:, None] - low) / (high - low))[:, 0].clamp(0.0, 1.0)
