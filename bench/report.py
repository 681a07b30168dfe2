"""Rows of results: as CSV, as JSON, as a table to read."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import ROOT

MEASURED = "measured"
NEEDS_GPU = "needs a GPU"
UNTESTED = "measured, UNTESTED"
FAILED = "failed"
OUT_OF_MEMORY = "out of memory"
FORMAT = 1


@dataclass(frozen=True)
class Row:
    """One variant of a case, and where it has goals, one of them. Times are of one call."""

    case: str
    variant: str
    device: str
    status: str = MEASURED
    p25_ms: float | None = None
    p50_ms: float | None = None
    p75_ms: float | None = None
    baseline: str | None = None
    ratio_p25: float | None = None
    ratio_p50: float | None = None
    ratio_p75: float | None = None
    """Of time / the baseline's time in the same round."""
    goal: str = ""
    reached: bool | None = None
    ops: int | None = None
    items: int | None = None
    launches: int | None = None
    gb_per_s: float | None = None
    """The least bytes the work moves, over the median time."""
    peak_mib: float | None = None
    note: str = ""


Facts = dict[str, Any]


def failure(case: str, variant: str, device: str, why: str) -> Row:
    """The row of what raised an error, of which `why` is one line; a GPU that is too small is no
    fault of what is measured."""
    small = why.startswith(torch.OutOfMemoryError.__name__)
    return Row(case, variant, device, status=OUT_OF_MEMORY if small else FAILED, note=why)


def marked(row: Row, why: str | None) -> Row:
    """The row; if `why` is given, its times are marked, as the code may be wrong."""
    if why is None or row.status != MEASURED:
        return row
    note = "; ".join(filter(None, (f"UNTESTED: {why}", row.note)))
    return replace(row, status=UNTESTED, note=note)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """The checkout's commit, with "-dirty" where files differ from it; without git, its sources'
    checksum."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return f"sources {checksum(ROOT)}"
    return f"{head}-dirty" if _git("status", "--porcelain") else head


def checksum(root: Path) -> str:
    """Of the sources of what is measured and of what measures: `python -c "from bench import
    report; print(report.checksum(report.ROOT))"` says it of any checkout."""
    found = hashlib.sha256()
    for folder in ("l0fast", "kernels", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def cpu_name() -> str:
    """The name of the processor, if the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def facts(command: str, threads: int, tested: bool) -> Facts:
    """The conditions of the results: machine, versions, date, command."""
    on_gpu = torch.cuda.is_available()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "format": FORMAT,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "tests": "passed" if tested else "SKIPPED",
        "cpu": cpu_name(),
        "threads": threads,
        "cores": os.cpu_count(),
        "load_at_start": load,
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "l0fast": _own_version(),
    }


def _own_version() -> str:
    import l0fast

    return l0fast.__version__


def as_csv(rows: Iterable[Row], about: Facts) -> str:
    """One line for each row, with the conditions."""
    names = [field.name for field in fields(Row)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, *about], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**asdict(row), **about})
    return text.getvalue()


def as_json(rows: Iterable[Row], about: Facts) -> str:
    """{"about": the facts, "rows": [...]}."""
    return json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n"


def write(rows: Sequence[Row], about: Facts, out: Path) -> None:
    """results.csv and results.json in `out`, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.csv", as_csv(rows, about)),
        ("results.json", as_json(rows, about)),
    ):
        part = out / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(out / name)


def significant(value: float) -> str:
    """Three digits, without an exponent if that is readable."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = 3 - len(str(int(abs(value)))) if abs(value) >= 1 else None
        return f"{value:.3g}" if digits is None else f"{value:.{max(digits, 0)}f}"
    return f"{value:.2e}"


def _cells(row: Row) -> tuple[str, ...]:
    if row.p25_ms is None or row.p50_ms is None or row.p75_ms is None:
        return (row.variant, row.status, "", "", "", row.note)
    time = significant(row.p50_ms)
    spread = f"({significant(row.p25_ms)}-{significant(row.p75_ms)})"
    ratio = "" if row.ratio_p50 is None else f"{significant(row.ratio_p50)}x {row.baseline}"
    goal = row.goal
    if goal:
        goal += {True: ": reached", False: ": NOT REACHED", None: ": not measured"}[row.reached]
    rest: list[str] = []
    if row.ops is not None:
        rest.append(f"{row.ops} ops, {row.items} .item()")
    if row.launches is not None:
        rest.append(f"{row.launches} kernels")
    if row.gb_per_s is not None:
        rest.append(f"{significant(row.gb_per_s)} GB/s")
    if row.ratio_p50 and row.baseline == "copy":
        rest.append(f"{100 / row.ratio_p50:.0f} % of copy")
    if row.peak_mib is not None:
        rest.append(f"peak {row.peak_mib:.0f} MiB")
    rest += [row.note] if row.note else []
    return (row.variant, time, spread, ratio, goal, "; ".join(rest))


def table(rows: Sequence[Row]) -> str:
    """The rows, case by case, in columns; those that need a GPU in one list at the end."""
    head = ("variant", "ms", "(p25-p75)", "ratio to", "goal", "")
    shown = [row for row in rows if row.status != NEEDS_GPU]
    cells = [_cells(row) for row in shown]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(5)]

    def line(parts: Sequence[str]) -> str:
        padded = [part.ljust(width) for part, width in zip(parts, widths, strict=False)]
        return ("  " + "  ".join([*padded, parts[5]])).rstrip()

    lines: list[str] = [line(head)] if shown else []
    case = ""
    for row, parts in zip(shown, cells, strict=True):
        if row.case != case:
            case = row.case
            lines.append(case)
        lines.append(line(parts))
    waiting = [row.case for row in rows if row.status == NEEDS_GPU]
    if waiting:
        lines += [f"{len(waiting)} cases need a GPU:", *(f"  {name}" for name in waiting)]
    return "\n".join(lines)
