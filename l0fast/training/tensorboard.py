"""The metrics of a run as TensorBoard's scalars, where TensorBoard is installed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TENSORBOARD = "tensorboard"
"""Name of the folder, in that of the run."""

Row = dict[str, Any]


def scalars(row: Row) -> dict[str, float]:
    """Tag -> value of a row of metrics: its numbers, and as name/constraint those of each
    constraint."""
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": part for key, part in value.items()}
        elif name != "epoch":  # the step
            found[name] = value
    return {tag: float(value) for tag, value in found.items() if isinstance(value, (int, float))}


def _summary_writer(folder: Path, purge_step: int | None) -> Any:
    """torch's SummaryWriter, or None where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


@contextmanager
def scalar_writer(out: Path | None, history: list[Row]) -> Generator[Callable[[Row], None]]:
    """Yields a function that writes a row of metrics into OUT/tensorboard, at its epoch as step.

    The rows of a resumed run's `history` are written again, in place of all that the folder holds:
    a killed run may have left some epoch out, or be one ahead of its checkpoint. Without
    TensorBoard, or without a folder, nothing is written.
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
