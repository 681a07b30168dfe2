"""Finds the runs that are done: in the output folder, or trained earlier and kept elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast.commands import runs
from l0fast.commands.runs import Run
from l0fast.training.folder import SUMMARY

Row = dict[str, Any]


def summaries_in(folders: Iterable[str]) -> list[Row]:
    """The summaries in folders, as NAME.json or NAME/summary.json.

    Raises:
        ValueError: there is no such folder.
    """
    summaries: list[Row] = []
    for name in folders:
        if not Path(name).is_dir():
            _checks.refuse("have", name, "a folder with summaries of runs")
        paths = sorted([*Path(name).glob("*.json"), *Path(name).glob(f"*/{SUMMARY}")])
        summaries += [runs.read_summary(path) for path in paths]
    return summaries


def finished(every: Sequence[Run], out: Path, elsewhere: Sequence[Row]) -> dict[str, Row]:
    """Name -> summary of the runs that are done, in the order of `every`.

    Args:
        every: the runs to look for.
        out: their folders are in this one.
        elsewhere: summaries of other folders; one counts if it is of the very same training.
    """
    here = runs.finished(every, out)
    done: dict[str, Row] = {}
    for run in every:
        summary = here.get(run.name) or next((one for one in elsewhere if run.is_of(one)), None)
        if summary is not None:
            done[run.name] = summary
    return done
