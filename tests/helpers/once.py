"""What is made once for all processes of a test run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

shared: Path | None = None
"""The folder that pytest-xdist's processes have in common; None where there is one process."""


def once_a_run(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives: made by the process that asks first, while others that ask wait.

    Args:
        name: of the file that keeps it.
        make: gives what JSON can hold, with lists for tuples.
    """
    if shared is None:
        return make()
    import fcntl  # not on Windows

    kept = shared / f"{name}.json"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.is_file():
            kept.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))
