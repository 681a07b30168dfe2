"""The device of a run."""

from __future__ import annotations

import torch

from l0fast import _checks


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
