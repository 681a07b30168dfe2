"""A step's forward by torch.compile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from l0fast import _checks

MOST_CODES = 256
"""How many codes a forward may have: one for each shape of a batch, in each stage of the gates.
PyTorch's own limit is 8, which three shapes exceed; what comes after it is not compiled."""


def check_backend(backend: str | None) -> None:
    """Refuses a backend that torch.compile does not have."""
    compiled(nn.Identity(), backend)


def compiled(model: nn.Module, backend: str | None) -> Any:
    """What a step calls, within `room_for_codes`: the model, or torch.compile's form of it.

    Each shape has code of its own, so that a resumed run computes what it would have computed.

    Raises:
        ValueError: there is no such backend.
    """
    if backend is None:
        return model
    try:
        return torch.compile(model, backend=backend, dynamic=False)
    except Exception as error:
        words = "a backend of torch.compile, such as 'inductor'"
        _checks.refuse("compile", backend, f"{words} ({_checks.one_line(error)})")


def room_for_codes(backend: str | None) -> AbstractContextManager[object]:
    """Within it a compiled forward may have MOST_CODES codes.

    A run that has met the limit and one that was resumed behind it would not have the same codes,
    and so not the same bits.
    """
    if backend is None:
        return nullcontext()
    return torch._dynamo.config.patch(
        recompile_limit=MOST_CODES, accumulated_recompile_limit=MOST_CODES**2
    )
