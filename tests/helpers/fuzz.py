"""Damage: single bytes of files, and entries of checkpoints; to count what notices it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from l0fast._digest import write_sealed

Path_ = tuple[Any, ...]
"""Keys and indices, from the outermost in."""


def flipped(content: bytes, tries: int, seed: int = 0) -> Iterator[tuple[int, bytes]]:
    """(place, content with the byte there changed), at random places."""
    numbers = random.Random(seed)
    for _ in range(tries):
        place = numbers.randrange(len(content))
        changed = bytearray(content)
        changed[place] ^= numbers.randrange(1, 256)
        yield place, bytes(changed)


def unnoticed(
    content: bytes, path: Path, tries: int, read: Callable[[Path], Any], same: Callable[[Any], bool]
) -> list[int]:
    """The places of changed bytes with which a file is read, and is not what it was.

    Args:
        content: of the whole file.
        path: where the changed ones are written to.
        tries: how many.
        read: reads a file; a ValueError refuses it.
        same: whether what was read is what the whole file holds.
    """
    found: list[int] = []
    for place, changed in flipped(content, tries):
        path.write_bytes(changed)
        try:
            value = read(path)
        except ValueError:
            continue
        if not same(value):
            found.append(place)
    return found


def _wrong(value: Any) -> Iterator[tuple[str, Any]]:
    """What an entry cannot be, by its class."""
    if isinstance(value, Tensor):
        yield "a list", value.tolist()
        yield "one more dimension", value.unsqueeze(0).repeat(2, *[1] * value.dim())
        yield "another dtype", value.to(torch.int16 if value.is_floating_point() else torch.float64)
        if value.is_floating_point():
            yield "NaN", torch.full_like(value, math.nan)
        return
    yield "a set", {1}
    yield "None" if value is not None else "a number", None if value is not None else 7
    if isinstance(value, dict):
        for key in value:
            yield f"without {key!r}", {k: v for k, v in value.items() if k != key}
        yield "a list", list(value)
        yield "one more key", value | {"more": 1}
    elif isinstance(value, list | tuple):
        yield "a dict", dict(enumerate(value))
    elif isinstance(value, bool):
        yield "a number", int(value)
    elif isinstance(value, int | float):
        yield "a text", "7"
        yield "NaN", math.nan
        yield "below all", -(2.0**70)
        yield "a bool", bool(value)
    elif isinstance(value, str):
        yield "a number", 7


def wrong_entries(state: Any, at: Path_ = ()) -> Iterator[tuple[Path_, str, Any]]:
    """(where, what, the wrong value) for each entry of a state, its parts too."""
    if at:
        for what, value in _wrong(state):
            yield at, what, value
    parts: Any = ()
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, list | tuple):
        parts = enumerate(state)
    for key, part in parts:
        yield from wrong_entries(part, (*at, key))


def replaced(state: Any, at: Path_, value: Any) -> Any:
    """A copy of a state with another value at one place."""
    if not at:
        return value
    if isinstance(state, tuple):
        return tuple(replaced(list(state), at, value))
    changed = copy.copy(state)
    changed[at[0]] = replaced(state[at[0]], at[1:], value)
    return changed


def write_checkpoint(path: Path, state: Any) -> None:
    """A checkpoint with a digest that fits, whatever is in it."""
    with path.open("wb") as file:
        write_sealed(file, lambda sealed: torch.save(state, sealed))
