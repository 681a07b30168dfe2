"""The device of a run, and its data and model on that device."""

from __future__ import annotations

import torch
from torch import nn

from l0fast import _checks
from l0fast.data.sets import Data, Split


def usable_device(device: str | torch.device | None) -> torch.device:
    """`device`, with its index; by default CUDA if there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=wanted).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        _checks.refuse("device", str(wanted), f"a device of this machine ({reason})")


def place_data(data: Data, device: torch.device) -> Data:
    """All splits on the device, images with channels last in memory."""
    validation = None if data.validation is None else _place_split(data.validation, device)
    train, test = _place_split(data.train, device), _place_split(data.test, device)
    return Data(train, validation, test, data.num_classes)


def place_model_(model: nn.Module, data: Data, device: torch.device) -> None:
    """Moves the model to the device, in place, in the memory format of the data."""
    model.to(device)
    if _are_images(data.train):
        model.to(memory_format=torch.channels_last)


def _place_split(split: Split, device: torch.device) -> Split:
    # Convolutions and pooling run about twice as fast on a CPU with channels last.
    layout = torch.channels_last if _are_images(split) else torch.contiguous_format
    return Split(split.inputs.to(device, memory_format=layout), split.targets.to(device))


def _are_images(split: Split) -> bool:
    """Whether the inputs are [N, channels, height, width]."""
    return split.inputs.dim() == 4
