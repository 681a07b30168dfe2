"""Writes the metrics of a run as TensorBoard's scalars, if TensorBoard is installed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l0fast.training.metrics import Row

TENSORBOARD = "tensorboard"
"""Name of the folder, in the run's."""


def scalars(row: Row) -> dict[str, float]:
    """Tag -> value of a row of metrics: its numbers by name, and those of each constraint by
    name/constraint."""
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": part for key, part in value.items()}
        elif name != "epoch":  # it is the step of all others
            found[name] = value
    return {tag: float(value) for tag, value in found.items() if isinstance(value, (int, float))}


def _summary_writer(folder: Path, purge_step: int | None) -> Any:
    """torch's SummaryWriter, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


@contextmanager
def scalar_writer(out: Path | None, history: list[Row]) -> Generator[Callable[[Row], None]]:
    """Yields a function that writes a row of metrics into OUT/tensorboard; its step is its epoch.

    A resumed run first writes the rows of its `history` again, and they replace all that the folder
    holds: a killed run may lack an epoch there, or be one ahead of its checkpoint. Without
    TensorBoard, or without `out`, nothing is written.
    """
    purge_step = 1 if history else None
    writer = None if out is None else _summary_writer(out / TENSORBOARD, purge_step)
    if writer is None:
        yield lambda row: None
        return
    with writer:

        def write(row: Row) -> None:
            for tag, value in scalars(row).items():
                writer.add_scalar(tag, value, row["epoch"])
            writer.flush()

        for row in history:
            write(row)
        yield write
