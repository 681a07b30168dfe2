"""Checks whether the rows of metrics in a checkpoint are rows of such a run."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from l0fast._metrics import ERROR, PERCENT, held_key, train_key, validation_key
from l0fast.training.checkpoint import EARLIER, Checkpoint
from l0fast.training.entries import Entries
from l0fast.training.metrics import Row
from l0fast.training.settings import TrainerSettings
from l0fast.training.task import TASKS

OF_ALL = ("epoch", "loss")
OF_GATES = ("expected_density", "realised_density", "layers", "settled", "collapsed")
OF_CONSTRAINTS = ("density", "measure", "feasible")
OF_MULTIPLIERS = ("aim", "lambda", "restarts", "stalls")
ROUNDED = 1.0 + 1e-3
"""The largest share that is accepted: sums of float32 may be slightly above 1."""


def best_epoch(history: Sequence[Row], settings: TrainerSettings, metric: str) -> int | None:
    """The epoch that `RunState.keep_if_best` keeps, computed from the rows of the epochs."""
    best: Row | None = None
    name = validation_key(metric)
    for row in history:
        may = settings.may_select(row["epoch"]) and row.get("feasible", True)
        if may and (best is None or row[name] <= best[name] or math.isnan(best[name])):
            best = row
    return None if best is None else best["epoch"]


@dataclass(frozen=True)
class Rows:
    """The form of the rows of a run.

    Args:
        settings: of the run.
        layers: names of its gated layers.
        constraints: names of its constraints.
        validation: whether it has a validation split; None if that is not known.
        metric: name of the metric.
        trained: whether it is also measured on the training examples.
    """

    settings: TrainerSettings
    layers: Collection[str]
    constraints: Collection[str]
    validation: bool | None
    metric: str = ERROR
    trained: bool = True

    def check(self, entries: Entries, checkpoint: Checkpoint) -> None:
        """Refuses rows that cannot be those of `checkpoint.epoch` epochs of such a run."""
        history = checkpoint.history
        entries.kind("history", history, list)
        if len(history) != checkpoint.epoch:
            entries.refuse("history", f"has {len(history)} rows, not {checkpoint.epoch}")
        for number, row in enumerate(history, 1):
            place = f"history.{number}"
            entries.names(place, row)
            # Rows of earlier versions lack some names, and have others.
            known = self._names(row)
            if checkpoint.format != EARLIER:
                entries.names(place, row, known)
            for key in (*self._of_all, *(["expected_density", "collapsed"] if self.layers else [])):
                if key not in row:
                    entries.refuse(place, f"has no {key!r}")
            entries.equal(f"{place}.epoch", row["epoch"], number)
            for key in known:
                if key in row:
                    self._check_value(entries, f"{place}.{key}", key, row[key])

    @property
    def _of_all(self) -> list[str]:
        train = [train_key(self.metric)] if self.trained else []
        return [*OF_ALL, *train, held_key(self.metric)]

    def _names(self, row: dict[str, Any]) -> list[str]:
        settings = self.settings
        names, validation = self._of_all, validation_key(self.metric)
        if self.validation or (self.validation is None and validation in row):
            names.append(validation)
        if settings.gated:
            names += OF_GATES
        if self.constraints:
            names += OF_CONSTRAINTS
        if self.constraints and settings.method == "l0":
            names += OF_MULTIPLIERS
        if settings.precision == "fp16":
            names.append("skipped_steps")
        return names if settings.shrink is None else [*names, "params"]

    def _check_value(self, entries: Entries, place: str, key: str, value: Any) -> None:
        """Checks the value of one metric."""
        keys = [key_of(self.metric) for key_of in (train_key, held_key, validation_key)]
        if key == "loss":
            entries.real(place, value, 0.0 if self.trained else -math.inf)
        elif key in keys and self.metric == TASKS[self.settings.task].metric:
            entries.real(place, value, 0.0, 100.0 if self.metric.endswith(PERCENT) else math.inf)
        elif key in keys:  # the user's own metric may have any value
            entries.kind(place, value, int, float)
        elif key in ("expected_density", "realised_density"):
            entries.real(place, value, 0.0, ROUNDED)
        elif key in ("density", "aim", "lambda", "restarts"):
            entries.names(place, value, self.constraints)
            signed = key == "lambda" and self.settings.dual == "equality"
            for name, number in value.items():
                entries.real(f"{place}.{name}", number, -math.inf if signed else 0.0)
        elif key in ("feasible", "settled"):
            entries.kind(place, value, bool)
        elif key in ("params", "skipped_steps"):
            entries.whole(place, value, 1 if key == "params" else 0)
        elif key == "measure":
            entries.equal(place, value, self.settings.measure)
        elif key == "collapsed":
            entries.kind(place, value, list)
            for name in value:
                entries.kind(f"{place}, in part,", name, str)
        elif key == "stalls":
            entries.names(place, value)
            for name, words in value.items():
                entries.kind(f"{place}.{name}", words, str)
        elif key == "layers":
            entries.names(place, value, self.layers)
            for name, layer in value.items():
                self._check_layer(entries, f"{place}.{name}", layer)

    @staticmethod
    def _check_layer(entries: Entries, place: str, layer: Any) -> None:
        entries.names(place, layer, ("kept", "of", "expected_density"))
        entries.whole(f"{place}.of", layer["of"], 1)
        entries.whole(f"{place}.kept", layer["kept"], 0, layer["of"])
        entries.real(f"{place}.expected_density", layer["expected_density"], 0.0, ROUNDED)
