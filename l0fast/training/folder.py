"""The folder of a run: what its files are called, and how they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast._files import PARTS, write_text
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.tensorboard import TENSORBOARD

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PRUNED = "pruned.safetensors"
PLOT = "dynamics.png"
FILES = (CHECKPOINT, METRICS, SUMMARY, PRUNED, PLOT)
UNSETTLED = "unsettled.pt"
"""Only where another run goes on from this one: its checkpoint of before its gates were decided."""
LATENCY = "latency.json"
"""Only where latency was measured."""

Row = dict[str, Any]


class RunFolder:
    """A folder that holds one run, or will.

    Args:
        path: of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def open(self, resume: bool) -> Path | None:
        """Makes the folder ready: the checkpoint to go on from, or None for a new run.

        Raises:
            ValueError: it is no folder, or holds a run that is not to be resumed.
            OSError: it cannot be made.
        """
        if self.path.exists() and not self.path.is_dir():
            _checks.refuse("out", str(self.path), "a folder")
        checkpoint = self / CHECKPOINT
        if resume and checkpoint.exists():
            return checkpoint
        if any((self / name).exists() for name in (*FILES, TENSORBOARD)):
            expected = "a folder without a run in it (or resume it)"
            _checks.refuse("out", str(self.path), expected)
        self.path.mkdir(parents=True, exist_ok=True)
        return None

    def sweep(self) -> None:
        """Removes what a process left that was killed while it wrote."""
        for part in self.path.glob(PARTS):
            part.unlink()

    def write_metrics(self, history: list[Row]) -> None:
        """A line of JSON for each row."""
        lines = [json.dumps(row) for row in history]
        write_text(self / METRICS, "".join(line + "\n" for line in lines))

    def write_summary(self, summary: Row) -> None:
        """The summary as JSON."""
        write_text(self / SUMMARY, json.dumps(summary, indent=2) + "\n")
