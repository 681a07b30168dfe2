"""Targets in words: a share of what there is, or an amount such as "100k params" or "2 ms"."""

from __future__ import annotations

import math
import re

from l0fast import _checks

Asked = float | str
"""A target as the caller says it: a density, or an amount with its unit."""

_COUNTS = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_PARTS = {"": 1.0, "m": 1e-3, "u": 1e-6, "µ": 1e-6, "n": 1e-9}
_UNITS = {"gates": "gates", "params": "params", "macs": "MACs", "memory": "B", "latency": "s"}
_EXAMPLES = {
    "gates": "100k gates",
    "params": "100k params",
    "macs": "5M MACs",
    "memory": "1 MB",
    "latency": "2 ms",
}


def _unit(measure: str) -> str:
    return _UNITS.get(measure, "cost")


def _amount(text: str, measure: str) -> float | None:
    """The amount above 0 that a text names, or None if it names none of that measure."""
    prefixes = _PARTS if measure == "latency" else _COUNTS
    unit = _unit(measure)
    letters = unit if len(unit) == 1 else f"(?i:{unit})"
    number = r"(\d[\d_]*(?:\.\d*)?(?:[eE][+-]?\d+)?)"
    match = re.fullmatch(rf"\s*{number}\s*([{''.join(prefixes)}]?)\s*{letters}\s*", text)
    amount = float(match[1]) * prefixes[match[2]] if match else 0.0
    return amount if 0.0 < amount < math.inf else None


def check(name: str, asked: object, measure: str) -> Asked:
    """`asked`, if it is a density in (0, 1] or an amount above 0 of what `measure` counts.

    Args:
        name: of the argument, for messages.
        asked: a number, or a text as in "100k params", "5M MACs", "1 MB" (10^6 bytes), "2 ms".
        measure: name of the measure.
    """
    if not isinstance(asked, str):
        return _checks.density(name, asked)
    if _amount(asked, measure) is None:
        example = _EXAMPLES.get(measure, "3.5 cost")
        _checks.refuse(name, asked, f"a density in (0, 1], or an amount such as {example!r}")
    return asked


def share(name: str, asked: Asked, measure: str, total: float, lowest: float = 0.0) -> float:
    """A checked target as a share of `total`.

    Raises:
        ValueError: it is not between `lowest` (a share) and all; the message has that range in
            the caller's unit.
    """
    if not isinstance(asked, str):
        return _checks.density(name, asked, low=lowest)
    amount = _amount(asked, measure)
    assert amount is not None
    if not lowest * total <= amount <= total:
        least = words(lowest * total, measure)
        _checks.refuse(name, asked, f"an amount from {least} to {words(total, measure)}")
    return amount / total


def words(value: float, measure: str) -> str:
    """An amount as a text: 266,610 params, 1.25 ms."""
    unit = _unit(measure)
    if measure == "latency":
        size, prefix = (1e-3, "m") if value >= 1e-3 else (1e-6, "u")
        return f"{value / size:.4g} {prefix}{unit}"
    return f"{value:,.6g} {unit}" if unit == "cost" else f"{value:,.0f} {unit}"
