"""The trainings of one comparison: each in its own folder. Those that are done are skipped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast._digest import KEY, check_json
from l0fast._files import read_text
from l0fast.commands import options, values
from l0fast.commands.progress import run as run_trainer
from l0fast.commands.setup import AUGMENT, set_up
from l0fast.data.sets import CLASSES, IMAGES
from l0fast.training.folder import SUMMARY
from l0fast.training.results import is_summary
from l0fast.training.settings import BEFORE, MAX_SEED

Row = dict[str, Any]


MANY = 10_000
"""A range of more seeds than this is refused."""
OF_TARGETS = ("dual", "dual_first", "dual_lr", "restarts", "target_schedule", "target_warmup")
"""Settings that a penalised run does not use."""


@dataclass(frozen=True)
class Run:
    """One training: its row of the table, and its options of `l0fast train`."""

    row: str
    args: argparse.Namespace

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.row}-seed-{self.args.seed}"

    def folder(self, out: Path) -> Path:
        """Its folder."""
        return out / self.name

    def is_of(self, summary: Mapping[str, Any]) -> bool:
        """Whether a summary belongs to this training.

        These are not compared: `skip` (the steps are the same); settings that the version of the
        summary did not have, unless `BEFORE` has them; for a run without a target, how it is met.
        """
        args = self.args
        kind = values.dataset(args)[0]
        facts = {name: getattr(args, name) for name in ("model", "recipe", "pretrained")}
        facts["dataset"] = kind
        facts["widths"] = values.widths(args.widths) or values.default_widths(args.model)
        facts["validation_fraction"] = values.validation_fraction(args)
        if kind == IMAGES:
            facts[AUGMENT] = args.augment
            facts["image_size"] = values.number("image_size", args.image_size, int)
        task = args.task or summary.get("settings", {}).get("task", CLASSES)
        settings = asdict(values.settings(args, [], task))
        unused = {"skip"} if settings["penalty"] is None else {"skip", *OF_TARGETS}
        saved = BEFORE | summary.get("settings", {})
        same = "settings" in summary and all(
            theirs.get(name) == value
            for ours, theirs in ((facts, summary), (saved, settings))
            for name, value in ours.items()
            if name not in unused
        )
        return same and summary.get("digest") == values.digest(args)  # last, as it takes longest


def words(**changed: Any) -> argparse.Namespace:
    """The options of `l0fast train`: the defaults, but for those in `changed`."""
    parser = argparse.ArgumentParser()
    options.add_training(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | changed)


def seeds(text: str) -> list[int]:
    """The seeds of `0-4` or `0,1,2`."""
    expected = "seeds such as 0-4 or 0,1,2"
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            _checks.refuse("seeds", text, expected)
        start, end = (values.number("seeds", one, int) for one in (first, last if dash else first))
        if end > MAX_SEED or end - start >= MANY:
            _checks.refuse("seeds", text, expected)
        found += range(start, end + 1)
    if not found or len(set(found)) < len(found) or max(found) > MAX_SEED:
        _checks.refuse("seeds", text, expected)
    return found


def select(runs: Sequence[Run], only: str | None) -> list[Run]:
    """The runs whose names match one of the patterns `A,B`.

    Raises:
        ValueError: a pattern matches no run.
    """
    if only is None:
        return list(runs)
    patterns = only.split(",")
    for pattern in patterns:
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            names = sorted({run.row for run in runs})
            _checks.refuse(
                "only",
                pattern,
                f"a pattern that matches a run: their names are ROW-seed-N, with a row of {names}",
            )
    return [run for run in runs if any(fnmatchcase(run.name, one) for one in patterns)]


def read_summary(path: Path) -> Row:
    """The summary of a run; empty if there is none, or if it is damaged."""
    try:
        summary = json.loads(read_text(path))
        if not is_summary(summary):
            return {}
        check_json(summary)
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: value for name, value in summary.items() if name != KEY}


def finished(runs: Iterable[Run], out: Path) -> dict[str, Row]:
    """Name -> summary of the runs that are done in `out`."""
    done: dict[str, Row] = {}
    for run in runs:
        summary = read_summary(run.folder(out) / SUMMARY)
        if run.is_of(summary):
            done[run.name] = summary
    return done


def by_row(runs: Iterable[Run], done: Mapping[str, Row]) -> dict[str, list[Row]]:
    """Row -> the summaries of its finished runs; rows without one are left out."""
    rows: dict[str, list[Row]] = {}
    for run in runs:
        if run.name in done:
            rows.setdefault(run.row, []).append(done[run.name])
    return rows


def train_all(
    runs: Sequence[Run],
    out: Path,
    done: dict[str, Row],
    quiet: bool,
    on_done: Callable[[], None],
) -> None:
    """Trains the runs that are not done yet, one after the other, each from its last checkpoint.

    Args:
        runs: to train.
        out: folder of their folders.
        done: name -> summary; the summaries of runs that end here or in other processes are added.
        quiet: shows no progress bar.
        on_done: called after each run.
    """
    for index, run in enumerate(runs, 1):
        done |= finished([run], out)  # another process may have trained it since
        if run.name in done:
            continue
        print(f"{index} of {len(runs)}: {run.name}", flush=True)
        setup = set_up(run.args)
        trainer = setup.trainer(setup.settings(), run.folder(out))
        trainer.open(resume=True)
        done[run.name] = run_trainer(trainer, quiet)
        on_done()
