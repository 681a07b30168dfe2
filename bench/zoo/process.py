"""A row of a table in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from bench import ROOT, environment

LAST_LINES = 12
"""How much is kept of what a process that failed has printed."""


def row_of(module: str, options: list[str], limit: float) -> dict[str, Any]:
    """What a module prints as JSON; or `failure` and `last_lines`, why it does not.

    Args:
        module: to run with `options`, one thread, and `limit` as its last option.
        limit: seconds after which it ends itself.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *options, str(limit)],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.returncode:
        return json.loads(done.stdout)
    said = done.stderr.replace(f"{ROOT}/", "")
    lines = said.strip().splitlines() or [f"exit code {done.returncode}"]
    late = [place for place, line in enumerate(lines) if line.startswith("Timeout (")]
    if late:
        # The call that was running comes first; of those around it, what is ours.
        ours = [line for line in lines[late[0] + 3 :] if 'File "/' not in line]
        where = lines[late[0] + 2 : late[0] + 3] + ours[:LAST_LINES]
        return {"failure": f"did not end within {limit:.0f} s", "last_lines": where}
    return {"failure": lines[-1][:300], "last_lines": lines[-LAST_LINES:]}
