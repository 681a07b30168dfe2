"""Whether the rows of metrics in a checkpoint are what a run has measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l0fast.training.checkpoint import Checkpoint
from l0fast.training.entries import Entries
from l0fast.training.metrics import VALIDATION
from l0fast.training.settings import TrainerSettings

SHARES = ("expected_density", "realised_density")
BY_CONSTRAINT = ("density", "aim", "lambda", "restarts")
ROUNDED = 1.0 + 1e-3
"""The most that a share may be: sums of float32 may be a little over 1."""


def check_history(
    entries: Entries,
    checkpoint: Checkpoint,
    settings: TrainerSettings,
    names: Sequence[str] | None,
    validation: bool,
) -> None:
    """Refuses rows that are not those of `checkpoint.epoch` epochs of such a run.

    Args:
        entries: of the checkpoint.
        checkpoint: its history.
        settings: of the run.
        names: of its constraints; None where they are not known, or there are none.
        validation: whether it has a validation split.
    """
    history = checkpoint.history
    entries.kind("history", history, list)
    if len(history) != checkpoint.epoch:
        entries.refuse("history", f"has {len(history)} rows, not {checkpoint.epoch}")
    for number, row in enumerate(history, 1):
        place = f"history.{number}"
        entries.names(place, row)
        required = ["epoch", "loss", "train_error_percent", "test_error_percent"]
        required += [VALIDATION] if validation else []
        required += ["expected_density", "collapsed"] if settings.gated else []
        required += ["density", "feasible"] if names is not None else []
        for key in required:
            if key not in row:
                entries.refuse(place, f"has no {key!r}")
        entries.equal(f"{place}.epoch", row["epoch"], number)
        for key, value in row.items():
            _check_value(entries, f"{place}.{key}", key, value, names)


def _check_value(
    entries: Entries, place: str, key: str, value: Any, names: Sequence[str] | None
) -> None:
    """What one metric may be; those of other versions are not known, and not read."""
    if key == "loss":
        entries.real(place, value, 0.0)
    elif key in ("train_error_percent", "test_error_percent", VALIDATION):
        entries.real(place, value, 0.0, 100.0)
    elif key in SHARES:
        entries.real(place, value, 0.0, ROUNDED)
    elif key in BY_CONSTRAINT:
        entries.names(place, value, names)
        for name, number in value.items():
            entries.real(f"{place}.{name}", number)
    elif key in ("feasible", "settled"):
        entries.kind(place, value, bool)
    elif key == "params":
        entries.whole(place, value, 1)
    elif key == "measure":
        entries.kind(place, value, str)
    elif key == "collapsed":
        entries.kind(place, value, list)
        for name in value:
            entries.kind(f"{place}, in part,", name, str)
    elif key == "stalls":
        entries.names(place, value)
        for name, words in value.items():
            entries.kind(f"{place}.{name}", words, str)
    elif key == "layers":
        entries.names(place, value)
        for name, layer in value.items():
            entries.names(f"{place}.{name}", layer, ("kept", "of", "expected_density"))
            entries.whole(f"{place}.{name}.of", layer["of"], 1)
            entries.whole(f"{place}.{name}.kept", layer["kept"], 0, layer["of"])
            expected = f"{place}.{name}.expected_density"
            entries.real(expected, layer["expected_density"], 0.0, ROUNDED)
