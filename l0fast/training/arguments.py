"""Checks of the arguments of a `Trainer`, before it changes or writes anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from l0fast import _checks
from l0fast.data.sets import SPLITS, Data, check_split
from l0fast.measures.latency import LatencyTable
from l0fast.training.batches import Batches, are_images, placed
from l0fast.training.compiling import check_backend
from l0fast.training.ranks import Ranks
from l0fast.training.settings import TrainerSettings
from l0fast.training.streams import check_stream


def check_arguments(
    model: object,
    data: Data,
    settings: TrainerSettings,
    table: LatencyTable | None,
    own_loss: bool = False,
) -> None:
    """Refuses a model that is not a module, bad data, and settings that do not fit data or table.

    Args:
        model, data, settings, table: as in `Trainer`.
        own_loss: whether the user gives the loss; then batches may be of any form.

    Raises:
        ValueError, TypeError: the message names the first argument that is wrong.
    """
    if not isinstance(model, nn.Module):
        _checks.refuse("model", type(model).__name__, "a torch.nn.Module", TypeError)
    if not any(one.requires_grad for one in model.parameters()):
        expected = "a model with a parameter that requires a gradient"
        _checks.refuse("model", type(model).__name__, expected)
    if not isinstance(data, Data):
        expected = "l0fast.data.sets.Data(train, validation, test)"
        _checks.refuse("data", type(data).__name__, expected, TypeError)
    for name in SPLITS:
        split, title = getattr(data, name), f"data.{name}"
        if split is None and name == "validation":
            continue
        if isinstance(split, tuple):
            check_split(title, split, None if own_loss else settings.task, data.num_classes)
        else:
            check_stream(title, split)
    if settings.select == "best" and data.validation is None:
        _checks.refuse("select", settings.select, "'last', as there is no validation split")
    check_backend(settings.compile)
    if settings.shrink is not None and Ranks.here().size > 1:
        _checks.refuse("shrink", settings.shrink, "None on several processes")
    if settings.augment != "none":
        streamed = not isinstance(data.train, tuple)
        what = "a stream" if streamed else f"inputs {list(data.train[0].shape)}"
        if streamed or not are_images(data.train[0]):
            why = "augment in its data set" if streamed else "they are not images"
            _checks.refuse("augment", settings.augment, f"'none' for {what}: {why}")
    if not (table is None or isinstance(table, LatencyTable)):
        _checks.refuse("table", table, "a LatencyTable or None", TypeError)
    if table is not None and settings.measure != "latency":
        _checks.refuse("table", "a latency table", f"none for measure={settings.measure!r}")


def json_facts(identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """`identity` after a round trip through JSON, so that it can be compared with a checkpoint's.

    Raises:
        TypeError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(dict(identity or {})))
    except TypeError:
        _checks.refuse("identity", identity, "facts that JSON can hold", TypeError)


def inputs_of(batch: Any) -> Tensor | None:
    """The first part of a batch, if that is a tensor."""
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    return first if isinstance(first, Tensor) else None


def example_of(batches: Batches, given: Any, device: torch.device) -> Any:
    """Inputs of the model's forward, on the device: those given, or those of a training example.

    Raises:
        ValueError: none are given, and a batch does not begin with a tensor.
    """
    if given is not None:
        return tree_map(lambda leaf: placed(leaf, device), given)
    batch = batches.first(1)
    inputs = inputs_of(batch)
    if inputs is None:
        expected = (
            f"the model's inputs: a batch, a {type(batch).__name__}, does not begin with them"
        )
        _checks.refuse("example_inputs", None, expected)
    return inputs
