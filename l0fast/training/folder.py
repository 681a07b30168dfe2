"""The folder of a run: the names of its files, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast._digest import sealed_json
from l0fast._extras import require
from l0fast._files import FolderLock, sweep, why_unwritable, write_atomically, write_text
from l0fast.constraints.constraint import DensityConstraint
from l0fast.measures.latency import LatencyTable
from l0fast.plots.dynamics import plot_dynamics
from l0fast.pruning.saving import save_pruned
from l0fast.training.checkpoint import CHECKPOINT, Checkpoint
from l0fast.training.method import Term
from l0fast.training.metrics import Row
from l0fast.training.tensorboard import TENSORBOARD

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
PRUNED = "pruned.safetensors"
PLOT = "dynamics.png"
FILES = (CHECKPOINT, METRICS, SUMMARY, PRUNED, PLOT)
UNSETTLED = "unsettled.pt"
"""The checkpoint from before the gates settled; only if another run starts from this one."""
LATENCY = "latency.json"
"""The latency table; only if the targets are about latency."""


class RunFolder:
    """The folder of one run, which need not exist yet; without a path nothing is written.

    Args:
        path: of the folder, or None.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self._lock: FolderLock | None = None

    def check(self, resume: bool = True) -> None:
        """Refuses a folder that cannot be opened (see `open`), before anything is done.

        Raises:
            ValueError: nothing can be written there, or it holds a run that is not to be resumed.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if self.path is None:
            return
        require("train", "matplotlib")  # a run ends with its picture
        if (why := why_unwritable(self.path)) is not None:
            _checks.refuse("out", str(self.path), f"a folder that can be written ({why})")
        if not resume and any((self.path / name).exists() for name in (*FILES, TENSORBOARD)):
            expected = "a folder without a run in it (or resume it)"
            _checks.refuse("out", str(self.path), expected)

    def open(self, resume: bool) -> Path | None:
        """Prepares the folder; returns the checkpoint to go on from, or None for a new run.

        It is locked until `close`, so that no other process can train in it. Temporary files of
        dead processes are removed.

        Raises:
            ValueError: nothing can be written there, another run is writing into it, or it holds a
                run and `resume` is False.
            OSError: it cannot be made.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if self.path is None:
            return None
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock(self.path)
        checkpoint = self.path / CHECKPOINT
        goes_on = resume and checkpoint.exists()
        try:
            self.check(goes_on)
        except ValueError:
            self.close()
            raise
        sweep(self.path)
        return checkpoint if goes_on else None

    def _take_lock(self, path: Path) -> None:
        self._lock = FolderLock(path)
        try:
            self._lock.acquire()
        except BlockingIOError:
            expected = "a folder that no other run is writing into at this moment"
            _checks.refuse("out", str(path), expected)

    def close(self) -> None:
        """Releases the lock."""
        if self._lock is not None:
            self._lock.release()

    def latency_table(
        self, given: LatencyTable | None, identity: Mapping[str, Any], device: torch.device
    ) -> LatencyTable | None:
        """The latency table of the run in this folder, if that run has this identity; else `given`.

        A resumed run keeps its table: its multipliers and targets are shares of the table's total,
        and another measurement would have another total.

        Raises:
            ValueError: the table of the run is not `given`.
        """
        path = None if self.path is None else self.path / CHECKPOINT
        if path is None or not path.is_file():
            return given
        try:
            checkpoint = Checkpoint.read(path, device)
            checkpoint.refuse_other_run(path, identity)
            known = checkpoint.table
        except ValueError:  # of another run, or damaged: `Trainer.open` refuses it
            return given
        if known is None:
            return given
        if given is not None and given.as_json() != known.as_json():
            _checks.refuse("table", "another latency table", f"the one of {path}, or none")
        return known

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint, then its metrics."""
        if self.path is not None:
            checkpoint.write(self.path / CHECKPOINT)
            self.write_metrics(checkpoint.history)

    def write_metrics(self, history: list[Row]) -> None:
        """Writes a line of JSON for each row."""
        if self.path is not None:
            lines = [json.dumps(row) for row in history]
            write_text(self.path / METRICS, "".join(line + "\n" for line in lines))

    def save_unsettled(self, checkpoint: Checkpoint) -> None:
        """Writes the checkpoint from before the gates settle."""
        if self.path is not None:
            checkpoint.write(self.path / UNSETTLED)

    def unsettled(self) -> Path | None:
        """The checkpoint that `save_unsettled` wrote, if it did."""
        path = None if self.path is None else self.path / UNSETTLED
        return path if path is not None and path.exists() else None

    def write_results(
        self,
        pruned: nn.Module | None,
        term: Term | None,
        history: list[Row],
        summary: Mapping[str, Any],
    ) -> None:
        """Writes the results of a finished run: pruned model, latency table, summary, plot."""
        if self.path is None:
            return
        if pruned is not None:
            save_pruned(pruned, self.path / PRUNED)
        targets: dict[str, float] | None = None
        if isinstance(term, DensityConstraint):
            targets = term.targets
            if term.table is not None:
                term.table.save(self.path / LATENCY)
        self.write_summary(summary)
        write_atomically(
            self.path / PLOT, lambda path: plot_dynamics(history, targets, summary, path)
        )

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary as JSON with its digest, over the present one."""
        if self.path is not None:
            write_text(self.path / SUMMARY, json.dumps(sealed_json(summary), indent=2) + "\n")
