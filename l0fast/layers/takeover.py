"""What a gated layer takes over from the dense one that it stands for, and hands back."""

from __future__ import annotations

import copy
from typing import Any

OF_GATES = (
    "gates",
    "noise",
    "units",
    "distribution",
    "stage",
    "_quiet",
    "dense_type",
    "beside",
    "_full",
)
"""The attributes that a layer has for its gates, and of which the dense one has nothing."""


def own_state(layer: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The attributes of a layer for another one: the very parameters and hooks.

    Args:
        layer: gated or dense.
        without: attributes to leave out.
    """
    # A layer that was compiled by itself holds its own class's forward in the first.
    without = ("_compiled_call_impl", "_places", *without)
    return {
        key: copy.copy(value) if isinstance(value, (dict, set)) else value
        for key, value in vars(layer).items()
        if key not in without
    }
