"""How much memory the process holds, and the most it held since it was last asked to forget."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

GIB = 2**30
_PROCESS = Path("/proc/self")
_FORGET = "5"
"""What sets the peak back to what is resident now; see proc(5), clear_refs."""


def resident(process: int | str = "self") -> int | None:
    """Resident bytes of a process, or None where the system does not tell them."""
    return _status(f"/proc/{process}/status", "VmRSS")


def _status(path: str, field: str) -> int | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0]) if found else None


def give_back() -> None:
    """Collects garbage, and hands freed memory back to the system where the allocator can.

    glibc keeps blocks of less than 32 MiB for later: without this, what one step has freed would
    count in the next one's peak.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def forget_peak() -> bool:
    """Sets the peak back; False where the system cannot, so that it stays the process's own."""
    try:
        (_PROCESS / "clear_refs").write_text(_FORGET, encoding="utf-8")
    except OSError:
        return False
    return True


def peak() -> int:
    """The most bytes that were resident since `forget_peak`, or since the process's start."""
    found = _status("/proc/self/status", "VmHWM")
    if found is not None:
        return found
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
