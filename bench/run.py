"""Runs the measuring process. If a case fails, the others are still measured."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Any

from bench import ROOT, environment
from bench.report import Row

WORKER = (sys.executable, "-m", "bench.worker")
Devices = dict[str, str]


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _message(line: str | None) -> dict[str, Any]:
    try:
        message = json.loads(line or "null")
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def run(
    cases: Devices,
    emit: Callable[[Sequence[Row]], None],
    *,
    quick: bool,
    threads: int,
    case_limit_s: float,
    deadline: float | None = None,
    worker: Sequence[str] = WORKER,
) -> None:
    """Measures cases in a process of their own, and in a new one after it broke.

    Args:
        cases: name -> device, in the order to measure.
        emit: takes the rows of each case as soon as there are any.
        quick, threads: passed on.
        case_limit_s: a case that takes longer is given up.
        deadline: of `time.monotonic`; what has not been measured then is given up.
        worker: the command of the measuring process.
    """
    left = list(cases)
    while left:
        if deadline is not None and time.monotonic() >= deadline:
            emit([Row(name, "all", cases[name], status="out of time") for name in left])
            return
        current, why = _one_process(
            left,
            emit,
            {"cases": left, "quick": quick, "threads": threads},
            threads,
            case_limit_s,
            deadline,
            worker,
        )
        if not left:
            return
        if current is None and why:  # no case was started, so the next process would fail, too
            emit([Row(name, "all", cases[name], status="failed", note=why) for name in left])
            return
        if current is not None:
            left.remove(current)
            emit([Row(current, "all", cases[current], status="failed", note=why)])


def _one_process(
    left: list[str],
    emit: Callable[[Sequence[Row]], None],
    asked: dict[str, Any],
    threads: int,
    case_limit_s: float,
    deadline: float | None,
    worker: Sequence[str],
) -> tuple[str | None, str]:
    """Takes what was measured off `left`; the case at which it ended early, and why."""
    process = subprocess.Popen(
        worker,
        cwd=ROOT,
        env=environment(threads),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    try:
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once; its exit code is reported below
    current: str | None = None
    finished = 0
    try:
        while True:
            wait = case_limit_s
            if deadline is not None:
                wait = max(0.0, min(wait, deadline - time.monotonic()))
            try:
                line = lines.get(timeout=wait)
            except queue.Empty:
                return current, f"did not end within {wait:.0f} s"
            if line is None:
                break
            message = _message(line)
            if "start" in message:
                current = str(message["start"])
                print(f"  {current}", file=sys.stderr, flush=True)
            if "rows" in message:
                emit([Row(**row) for row in message["rows"]])
                left.remove(str(message["done"]))
                current, finished = None, finished + 1
        code = process.wait(timeout=60)
        # After a GPU fault between two cases a new process goes on; without any progress none does.
        why = f"the measuring process ended with exit code {code}"
        return current, why if current is not None or finished == 0 else ""
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()
