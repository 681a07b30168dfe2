"""What the latest forward of a model gave a gated layer: the one place where tests look at it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def compact(layer: Any) -> Any:
    """What a gated layer of one model left out in the latest forward, or None."""
    ((board, _),) = layer._places
    return board.latest.compacts.get(id(layer))


def drawn(layer: Any) -> Tensor:
    """The gates that the latest forward drew for it."""
    ((board, place),) = layer._places
    z = board.latest.z[place]
    assert z is not None
    return z
