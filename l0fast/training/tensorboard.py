"""Writes the metrics of a run as scalars of TensorBoard, if TensorBoard is installed."""

from __future__ import annotations

import importlib
import io
import itertools
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from l0fast import _checks, _warnings
from l0fast.training.metrics import Row

TENSORBOARD = "tensorboard"
"""Name of the folder, in the folder of the run."""


def scalars(row: Row) -> dict[str, float]:
    """Tag -> value of a row of metrics. Tags are names, or name/constraint for numbers of a
    constraint."""
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{name}/{key}": part for key, part in value.items()}
        elif name != "epoch":  # the epoch is the step of the other values
            found[name] = value
    return {tag: float(value) for tag, value in found.items() if isinstance(value, (int, float))}


_NUMBERS = itertools.count()
"""Numbers of the files of this process."""


def _installed() -> bool:
    try:
        importlib.import_module("tensorboard")
    except ImportError:
        return False
    return True


class _Events:
    """A new file of events. It is written in this thread, so that errors are raised here."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._records = event_pb2, summary_pb2, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        place = f"{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        # Without a buffer, nothing is left to be written when a file is closed after an error.
        path = folder / f"events.out.tfevents.{place}"
        self.file = path.open("wb", buffering=0)

    def _write(self, events: list[dict[str, Any]]) -> None:
        content = io.BytesIO()
        records = self._records(content)
        for entries in events:
            event = self._event.Event(wall_time=time.time(), **entries)
            records.write(event.SerializeToString())
        left = memoryview(content.getvalue())
        while left:  # a full disk may take only a part
            left = left[self.file.write(left) :]

    def begin(self, purge: bool) -> None:
        """Writes the head of the file; with `purge` TensorBoard ignores all earlier files."""
        head: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        if purge:
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            head.append({"step": 1, "session_log": start})
        self._write(head)

    def write(self, row: Row) -> None:
        """Appends a row of metrics."""
        of = self._summary.Summary
        values = [of.Value(tag=tag, simple_value=value) for tag, value in scalars(row).items()]
        self._write([{"step": row["epoch"], "summary": of(value=[value])} for value in values])


@contextmanager
def scalar_writer(out: Path | None, history: list[Row]) -> Generator[Callable[[Row], None]]:
    """Yields a function that writes a row of metrics into OUT/tensorboard; its step is its epoch.

    A resumed run first writes the rows of its `history` again, and they replace the earlier files:
    the files of a killed run may be an epoch behind or ahead of its checkpoint. Without
    TensorBoard, or without `out`, nothing is written. If the folder cannot be written, the run
    warns once and goes on without it; metrics.jsonl has all rows.
    """
    if out is None or not _installed():
        yield lambda row: None
        return
    folder, opened = out / TENSORBOARD, list[_Events]()

    def attempt(work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            while opened:
                with suppress(OSError):
                    opened.pop().file.close()
            words = f"{folder} cannot be written ({_checks.one_line(error)}); the run goes on"
            _warnings.warn(f"{words}, and metrics.jsonl has its metrics")

    def begin() -> None:
        opened.append(_Events(folder))
        opened[0].begin(purge=bool(history))
        for row in history:
            opened[0].write(row)

    attempt(begin)
    try:
        yield lambda row: attempt(lambda: [events.write(row) for events in opened])
    finally:
        attempt(lambda: [events.file.close() for events in opened])
