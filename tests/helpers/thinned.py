"""Cases that are many and alike: all of them run in `make test-all`, a part in `make test`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """The cases for pytest.mark.parametrize: all but each `every`-th are marked exhaustive."""
    return [
        _case(case if isinstance(case, tuple) else (case,), place % every)
        for place, case in enumerate(cases)
    ]


def telling(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """The cases for pytest.mark.parametrize: all but those of `kept` are marked exhaustive.

    Raises:
        ValueError: one of `kept` is no case.
    """
    found = list(cases)
    for one in kept:
        if one not in found:
            raise ValueError(f"kept: got {one!r}; expected one of the cases")
    return [_case(case if isinstance(case, tuple) else (case,), case not in kept) for case in found]


def thinned_product(every: int, first: Iterable[Any], *others: Iterable[Any]) -> list[Any]:
    """The same for all combinations of some values. Each value of the first argument stays with
    other values of the others than its neighbour does, if `every` is at most their combinations."""
    rest = list(itertools.product(*others))
    return [
        _case((value, *values), (place + shift) % every)
        for shift, value in enumerate(first)
        for place, values in enumerate(rest)
    ]


def _case(values: tuple[Any, ...], left_out: int) -> Any:
    return pytest.param(*values, marks=[pytest.mark.exhaustive] * bool(left_out))
