"""The forward of a step, compiled by torch.compile."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from l0fast import _checks

MOST_CODES = 256
"""The most compiled codes of a forward: it needs one for each shape of a batch in each stage of the
gates. PyTorch's own limit is 8, which three shapes exceed; past the limit nothing is compiled."""


def check_backend(backend: str | None) -> None:
    """Refuses a backend that torch.compile does not have."""
    compiled(nn.Identity(), backend)


def compiled(model: nn.Module, backend: str | None) -> Any:
    """The model that a step calls, within `room_for_codes`: compiled if there is a backend.

    Each shape has its own code, so that a resumed run computes the same bits.

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

    A run that exceeds the limit, and one that is resumed after that, would have different codes,
    and so different bits.
    """
    if backend is None:
        return nullcontext()
    return torch._dynamo.config.patch(
        recompile_limit=MOST_CODES, accumulated_recompile_limit=MOST_CODES**2
    )
