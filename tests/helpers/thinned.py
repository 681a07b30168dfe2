"""Cases that are many and alike: all of them run in `make test-all`, a part in `make test`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int) -> list[Any]:
    """The cases for pytest.mark.parametrize: all but each `every`-th are marked exhaustive."""
    chosen = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*case, marks=[pytest.mark.exhaustive] * bool(place % every))
        for place, case in enumerate(chosen)
    ]


def thinned_product(every: int, *values: Iterable[Any]) -> list[Any]:
    """The same for all combinations of some values."""
    return thinned(itertools.product(*values), every)
