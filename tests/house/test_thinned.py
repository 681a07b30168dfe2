"""What `make test` runs of cases that are alike."""

from __future__ import annotations

import pytest

from tests.helpers.thinned import telling, thinned, thinned_product


def kept(cases: list[object]) -> list[object]:
    return [case.values for case in cases if not case.marks]  # type: ignore[attr-defined]


def test_each_third_stays_and_the_others_are_exhaustive() -> None:
    cases = thinned(["a", ("b", 1), "c", "d"], 3)
    assert kept(cases) == [("a",), ("d",)]
    assert {mark.name for case in cases for mark in case.marks} == {"exhaustive"}


def test_those_that_are_named_stay() -> None:
    assert kept(telling(["a", ("b", 1), "c"], ["c", ("b", 1)])) == [("b", 1), ("c",)]
    with pytest.raises(ValueError, match="kept: got 'd'; expected one of the cases"):
        telling(["a"], ["d"])


@pytest.mark.parametrize(("every", "lengths"), [(3, (9, 6)), (3, (3, 3)), (5, (10, 3, 2))])
def test_every_value_stays_in_some_combination(every: int, lengths: tuple[int, ...]) -> None:
    """Also where `every` divides the combinations that a value of the first argument is in."""
    found = kept(thinned_product(every, *map(range, lengths)))
    for axis, length in enumerate(lengths):
        assert {values[axis] for values in found} == set(range(length))  # type: ignore[index]
    assert len(found) < sum(1 for _ in thinned_product(1, *map(range, lengths))) / 2
