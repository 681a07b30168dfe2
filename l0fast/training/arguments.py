"""Checks of what a `Trainer` is given, before it changes or writes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from l0fast import _checks
from l0fast.data.sets import Data, check_data
from l0fast.measures.latency import LatencyTable
from l0fast.training.settings import TrainerSettings


def check_arguments(
    model: object, data: Data, settings: TrainerSettings, table: LatencyTable | None
) -> None:
    """Refuses a model that is no module, bad data, and settings that do not fit data or table.

    Raises:
        ValueError, TypeError: with the first argument that is wrong.
    """
    if not isinstance(model, nn.Module):
        _checks.refuse("model", type(model).__name__, "a torch.nn.Module", TypeError)
    check_data(data)
    if settings.select == "best" and data.validation is None:
        _checks.refuse("select", settings.select, "'last' without a validation split")
    if settings.augment != "none" and data.train.inputs.dim() != 4:
        shape = list(data.train.inputs.shape)
        _checks.refuse("augment", settings.augment, f"'none' for inputs {shape}: no images")
    if not (table is None or isinstance(table, LatencyTable)):
        _checks.refuse("table", table, "a LatencyTable or None", TypeError)
    if table is not None and settings.measure != "latency":
        _checks.refuse("table", "a latency table", f"none for measure={settings.measure!r}")


def json_facts(identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """`identity` as JSON gives it back, so that it equals what a checkpoint or summary holds.

    Raises:
        TypeError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(dict(identity or {})))
    except TypeError:
        _checks.refuse("identity", identity, "facts that JSON can hold", TypeError)
