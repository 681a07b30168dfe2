"""Chooses the device of a run, and makes the batches of its data."""

from __future__ import annotations

from typing import Any

import torch

from l0fast import _checks
from l0fast.data.sets import SPLITS, Data, Split
from l0fast.training.batches import Batches, InMemory
from l0fast.training.settings import TrainerSettings
from l0fast.training.streams import Streamed


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device` with its index; the default is CUDA if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros((), device=wanted).device
        if device.type == "meta":
            raise RuntimeError("meta computes nothing")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        _checks.refuse("device", str(wanted), f"a device of this machine ({reason})")


def make_batches(name: str, split: Any, settings: TrainerSettings, device: torch.device) -> Batches:
    """The batches of a split, for that device; `name` is for messages."""
    if isinstance(split, tuple):
        return InMemory(Split(*split), settings, device)
    return Streamed(name, split, settings.seed, device)


def place(data: Data, settings: TrainerSettings, device: torch.device) -> Any:
    """(train, validation or None, test): the batches of all splits."""
    splits = {name: getattr(data, name) for name in SPLITS}
    return [
        None if split is None else make_batches(f"data.{name}", split, settings, device)
        for name, split in splits.items()
    ]
