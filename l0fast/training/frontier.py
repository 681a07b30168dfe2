"""Several targets from one run: error against size, a pruned model for each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast._files import write_atomically, write_text
from l0fast._tables import aligned
from l0fast.data.sets import Data
from l0fast.measures.stopwatch import whole_seconds
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.settings import TrainerSettings
from l0fast.training.trainer import Trainer

FRONTIER = "frontier.json"
PLOT = "frontier.png"
LATENCY_BATCH = 128

Row = dict[str, Any]


def frontier(
    model: nn.Module,
    data: Data,
    settings: TrainerSettings,
    targets: Sequence[float],
    *,
    out: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    resume: bool = False,
    train: Callable[[Trainer], Row] | None = None,
) -> list[Row]:
    """Trains to the first target, prunes a copy, goes on to the next from where it was, and so on.

    Each target has `settings.epochs` epochs, a schedule and multipliers of its own; weights,
    gates, the optimizer's moments and the noise go on from the end of the one before, or, where
    its gates were decided, from the epoch before that: its last epochs are for its own model, and
    a gate that is closed there may be open in the next. Each is a
    run as the `Trainer`'s, in the folder OUT/density-TARGET; OUT/frontier.json has the rows, and
    OUT/frontier.png shows them. An interrupted frontier goes on in the middle of any target, bit
    for bit but for latencies, which are measured anew.

    Args:
        model, data, out, identity, device: as of `Trainer`; the model is trained in place.
        settings: for each target; it takes the place of their density.
        targets: densities of the whole model by `settings.measure`, falling.
        resume: goes on from the checkpoints in `out`.
        train: trains a trainer that is open to its end and returns its summary, for those who want
            to watch; `Trainer.fit` by default.

    Returns:
        The summary of each target, with "milliseconds" and "dense_milliseconds": of one forward of
        LATENCY_BATCH test examples, medians, side by side on this machine.

    Raises:
        ValueError, TypeError: targets that do not fall, or settings that name others; `out` holds
            a run and is not resumed; and as `Trainer` does.
    """
    wanted = _falling(targets)
    if settings.penalty is not None or settings.layer_density is not None:
        _checks.refuse("settings", "a penalty or layer_density", "neither beside targets")
    options: dict[str, Any] = {"identity": identity, "device": device}
    dense = copy.deepcopy(model)
    folder = None if out is None else Path(out)
    places = {t: None if folder is None else folder / f"density-{t:g}" for t in wanted}
    if not resume:  # before the first is trained, for all of them
        for place in filter(None, places.values()):
            if place.exists():
                _checks.refuse("out", str(place), "no such folder yet (or resume it)")
    before: Checkpoint | None = None
    rows: list[Row] = []
    small: dict[str, nn.Module] = {}
    examples = data.test.inputs[:LATENCY_BATCH]
    for target, place in places.items():
        trainer = Trainer(model, data, replace(settings, density=target), out=place, **options)
        trainer.open(resume, before, onward=target != wanted[-1])
        rows.append(trainer.fit() if train is None else train(trainer))
        before = trainer.to_go_on_from()
        model = trainer.model
        if trainer.pruned is not None:
            small[f"{target:g}"] = trainer.pruned
        examples = trainer.data.test.inputs[:LATENCY_BATCH]
    dense.to(examples.device)
    models = [dense, *(small[f"{target:g}"] for target in wanted)]
    whole, *seconds = whole_seconds(models, (examples,))
    for row, each in zip(rows, seconds, strict=True):
        row["milliseconds"], row["dense_milliseconds"] = 1000 * each, 1000 * whole
    if folder is not None:
        from l0fast.plots.frontier import plot_frontier

        write_text(folder / FRONTIER, json.dumps(rows, indent=2) + "\n")
        write_atomically(folder / PLOT, lambda path: plot_frontier(rows, path))
    return rows


def _falling(targets: Sequence[float]) -> list[float]:
    """The targets as densities."""
    expected = "densities that fall, such as (0.5, 0.3, 0.1)"
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        _checks.refuse("targets", targets, expected, TypeError)
    wanted = [_checks.density(f"targets[{i}]", target) for i, target in enumerate(targets)]
    if not wanted or any(a <= b for a, b in pairwise(wanted)):
        _checks.refuse("targets", list(targets), expected)
    return wanted


def format_frontier(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a frontier as a table."""
    head = ("target", "measure", "test error %", "density", "params", "MACs", "ms", "pruned to")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        lines.append(
            (
                f"{row['target_density']:g}",
                row["measure"],
                f"{row['test_error_percent']:.2f}",
                f"{row['realised_density']:.4f}",
                f"{row['params']:,} ({100 * row['params_fraction']:.1f} %)",
                f"{row['macs']:,} ({100 * row['macs_fraction']:.1f} %)",
                f"{row['milliseconds']:.3g} of {row['dense_milliseconds']:.3g}",
                row["architecture"],
            )
        )
    return "\n".join(aligned(lines, left=2))
