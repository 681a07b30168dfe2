"""Checks of the entries of a checkpoint, before any of them is used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from l0fast import _checks


@dataclass(frozen=True)
class Entries:
    """Checks of a checkpoint's entries. A check that fails raises an error with the entry's name.

    Args:
        path: of the checkpoint.
        option: the user's option that named it.
        expected: what it should be, in words.
    """

    path: Path
    option: str = "resume"
    expected: str = "a whole checkpoint of this run"

    def refuse(self, entry: str, problem: str) -> NoReturn:
        """Raises a ValueError that names the entry and the problem."""
        _checks.refuse(self.option, str(self.path), f"{self.expected} (its {entry} {problem})")

    def kind(self, entry: str, value: object, *kinds: type) -> None:
        """Refuses a value of another class; a bool is not an int."""
        if type(value) not in kinds:
            names = " or ".join(kind.__name__ for kind in kinds)
            self.refuse(entry, f"is {_short(value)}, not a {names}")

    def whole(self, entry: str, value: object, low: int, high: float = math.inf) -> None:
        """Refuses anything but a whole number between `low` and `high`."""
        self.kind(entry, value, int)
        assert isinstance(value, int)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            self.refuse(entry, f"is {value}, not {bounds}")

    def real(
        self, entry: str, value: object, low: float = -math.inf, high: float = math.inf
    ) -> None:
        """Refuses anything but a finite number between `low` and `high`."""
        self.kind(entry, value, int, float)
        assert isinstance(value, (int, float))
        if not (math.isfinite(value) and low <= value <= high):
            self.refuse(entry, f"is {value!r}, not a finite number from {low:g} to {high:g}")

    def names(self, entry: str, value: object, wanted: Iterable[str] | None = None) -> None:
        """Refuses anything but a dict with strings as keys; `wanted` are the only keys allowed."""
        if not isinstance(value, dict):
            self.refuse(entry, f"is {_short(value)}, not a dict")
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            self.refuse(entry, f"has the key {odd!r}")
        if wanted is None:
            return
        for key in sorted({*wanted} ^ value.keys()):
            self.refuse(entry, f"has {'an unknown' if key in value else 'no'} {key!r}")

    def equal(self, entry: str, value: object, wanted: object) -> None:
        """Refuses a value that is not the one wanted; True, 1 and 1.0 are different values."""
        if not _same(value, wanted):
            self.refuse(entry, f"is {_short(value)}, not {_short(wanted)}")

    def tensor(
        self,
        entry: str,
        value: object,
        like: Tensor,
        low: float = -math.inf,
        finite: bool = True,
    ) -> None:
        """Refuses anything but a tensor with the shape and dtype of `like`; also NaN, numbers under
        `low`, and (if `finite`) infinity."""
        if not isinstance(value, Tensor):
            self.refuse(entry, f"is {_short(value)}, not a tensor")
        for what, got, wanted in (
            ("dtype", value.dtype, like.dtype),
            ("layout", value.layout, like.layout),
            ("shape", tuple(value.shape), tuple(like.shape)),
        ):
            if got != wanted:
                self.refuse(entry, f"has {what} {got}, not {wanted}")
        if not (value.is_floating_point() or value.is_complex()) or not value.numel():
            return
        numbers = value.detach()
        if bool((numbers.isfinite() if finite else ~numbers.isnan()).logical_not().any()):
            self.refuse(entry, "holds NaN" + (" or infinity" if finite else ""))
        if low > -math.inf and bool((numbers < low).any()):
            self.refuse(entry, f"holds a number under {low:g}")

    def indices(self, entry: str, value: object, size: int) -> None:
        """Refuses anything but a list of ascending whole numbers in [0, size), at least one."""
        self.kind(entry, value, list)
        assert isinstance(value, list)
        ascending = all(type(one) is int for one in value) and value == sorted(set(value))
        if not value or not ascending or value[0] < 0 or value[-1] >= size:
            self.refuse(entry, f"is not a list of ascending numbers in [0, {size})")

    def generator(self, entry: str, value: object, device: torch.device) -> None:
        """Refuses anything but the state of a generator of that device."""
        if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
            self.refuse(entry, f"is {_short(value)}, not the state of a generator")
        try:
            torch.Generator(device).set_state(value.cpu())
        except (RuntimeError, TypeError) as error:
            self.refuse(entry, f"is not the state of a generator ({_checks.one_line(error)})")


def _same(value: object, wanted: object) -> bool:
    if isinstance(value, Tensor) and isinstance(wanted, Tensor):
        return value.dtype == wanted.dtype and torch.equal(value.cpu(), wanted.cpu())
    if isinstance(wanted, Mapping):
        return isinstance(value, Mapping) and (
            list(value) == list(wanted) and all(_same(value[key], wanted[key]) for key in wanted)
        )
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return type(value) is type(wanted) and (
            len(value) == len(wanted)  # type: ignore[arg-type]
            and all(_same(a, b) for a, b in zip(value, wanted, strict=True))  # type: ignore[call-overload]
        )
    return type(value) is type(wanted) and value == wanted


def _short(value: object) -> str:
    if isinstance(value, (str, int, float, bool, type(None))):
        words = repr(value)
        return words if len(words) <= 60 else f"{words[:57]}..."
    return f"a {type(value).__name__}"
