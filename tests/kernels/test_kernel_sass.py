"""The instruction budget: what makes the kernels memory-bound, held without a GPU."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from tests.helpers.once import once_a_run
from tests.helpers.thinned import telling
from tests.kernels.sass import ARCHITECTURES, BUDGETS, FLOOR, NAIVE, VARIANTS, Count, counted

GATED = [name for name in BUDGETS if name.startswith("gated_weight")]
EVERYWHERE = [(name, arch) for name in GATED for arch in ARCHITECTURES]
CASES = EVERYWHERE + [(name, 90) for name in BUDGETS if name not in GATED]


@functools.cache
def counts(architecture: int) -> dict[str, Count]:
    """By kernel."""
    found = once_a_run(f"sass_{architecture}", lambda: counted("sass", architecture))
    return {count.kernel: count for count in (Count(**record) for record in found)}


@pytest.mark.parametrize(
    ("kernel", "architecture"), telling(CASES, [one for one in CASES if one[1] == 90])
)
def test_kernel_is_within_its_budget(kernel: str, architecture: int) -> None:
    budget, count = BUDGETS[kernel], counts(architecture)[kernel]
    assert budget.over(count) == []


@pytest.mark.parametrize("kernel", list(VARIANTS))
def test_variant_compiles_and_does_not_spill(kernel: str) -> None:
    count = counts(90)[kernel]
    assert (count.stack, count.local) == (0, 0)


@pytest.mark.parametrize("architecture", telling(ARCHITECTURES, [90]))
def test_the_naive_kernel_is_over_every_budget(architecture: int) -> None:
    naive = counts(architecture)[NAIVE]
    assert naive.instructions > FLOOR
    # A fault of each kind is found: it converts integers, multiplies in halves, loads word by word.
    over = BUDGETS["gated_weight fp32"].over(naive)
    kinds = {line.split(":")[0] for line in over}
    assert kinds >= {"instructions", "int_to_float", "high_products", "wide loads", "wide stores"}


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("mufu", 7.0, "mufu"),
        ("registers", 65, "registers"),
        ("stack", 8, "stack"),
        ("local", 2, "local"),
        ("narrow_loads", 9, "narrow loads"),
        ("narrow_stores", 9, "narrow stores"),
    ],
)
def test_each_limit_can_fail(field: str, value: float, kind: str) -> None:
    good = counts(90)["gated_weight fp32"]
    worse = dataclasses.replace(good, **{field: value})
    assert [line.split(":")[0] for line in BUDGETS["gated_weight fp32"].over(worse)] == [kind]
