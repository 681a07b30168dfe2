"""Checks of what a caller passes in: one clear line, raised before anything is changed."""

from __future__ import annotations

import math
import unicodedata
from typing import NoReturn

from torch import Tensor, nn


def refuse(name: str, got: object, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raises `error` with the one form every message of the library has."""
    raise error(f"{name}: got {got!r}; expected {expected}")


def printable(text: str, keep: str = "") -> str:
    """`text` with control characters, which a terminal would obey, as escapes; but for `keep`."""
    return "".join(
        one if one in keep or not _is_control(one) else one.encode("unicode_escape").decode()
        for one in text
    )


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def one_line(error: Exception) -> str:
    """What was raised, for a message: its class and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def module(name: str, value: object) -> nn.Module:
    """`value`, if it is a module."""
    if not isinstance(value, nn.Module):
        refuse(name, type(value).__name__, "a torch.nn.Module", TypeError)
    return value


def number(
    name: str,
    value: object,
    expected: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """`value` as a float, if it is a finite number between `low` and `high`.

    `expected` is the range in words; `open_low` and `open_high` leave the end itself out.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(name, value, expected, TypeError)
    try:
        as_float = float(value)
    except OverflowError:  # an int of hundreds of digits
        as_float = math.nan
    below = as_float <= low if open_low else as_float < low
    above = as_float >= high if open_high else as_float > high
    if not math.isfinite(as_float) or below or above:
        refuse(name, value, expected)
    return as_float


def whole(name: str, value: object, low: int = 1, high: float = math.inf) -> int:
    """`value` as an int, if it is a whole number between `low` and `high`."""
    expected = f"a whole number >= {low}" + ("" if high == math.inf else f" and <= {high}")
    number(name, value, expected, low=low, high=high)
    if not isinstance(value, int):
        refuse(name, value, expected)
    return int(value)


def density(name: str, value: object, low: float = 0.0) -> float:
    """`value` as a density: a number in (0, 1], or in [low, 1] where `low` is given."""
    if low:
        return number(name, value, f"a density in [{low:.6g}, 1]", low=low, high=1.0)
    return number(name, value, "a density in (0, 1]", low=0.0, high=1.0, open_low=True)


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a `value` that is not among `choices`."""
    if value not in choices:
        words = ", ".join(repr(choice) for choice in choices)
        refuse(name, value, f"one of {words}")


def auto_or_bool(name: str, value: object) -> None:
    """Refuses what neither says whether nor leaves it to the library."""
    if not isinstance(value, bool) and value != "auto":
        refuse(name, value, "'auto', True or False")


def floating(name: str, value: object) -> Tensor:
    """`value` as a tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        refuse(name, type(value).__name__, "a tensor", TypeError)
    if not value.is_floating_point():
        refuse(name, str(value.dtype), "a floating dtype", TypeError)
    return value


def segments(tensor: Tensor, sizes: object) -> None:
    """Refuses `sizes` that do not cut `tensor` [N] into segments."""
    wanted = f"one or more lengths >= 0 with the sum of {tuple(tensor.shape)}"
    if not isinstance(sizes, (tuple, list)) or not all(type(size) is int for size in sizes):
        refuse("sizes", sizes, wanted, TypeError)
    total = tensor.numel() if tensor.dim() == 1 else -1
    if not sizes or min(sizes) < 0 or sum(sizes) != total:
        refuse("sizes", sizes, wanted)
