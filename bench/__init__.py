"""Measurements: `python -m bench` tests, then times, then says what was reached.

One `bench_x` for each op, whole training steps and pruned models; `published` holds the baselines.
`poster` trains what the paper reports.
Not part of the installed package: it runs from a checkout, installed or not.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"

# A checkout that is not installed: the kernels' package lies one folder down.
if str(KERNELS) not in sys.path:
    sys.path.insert(0, str(KERNELS))


def environment(threads: int) -> dict[str, str]:
    """The environment of a child process: this checkout first on its path, and its threads."""
    paths = [str(ROOT), str(KERNELS), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": str(threads),
    }
