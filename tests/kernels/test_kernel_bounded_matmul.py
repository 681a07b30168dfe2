"""What the skipping products are compiled to: matrix units, wide loads, no spills; with no GPU."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from tests.kernels.sass import ARCHITECTURES, counted
from tests.kernels.sass_skipping import GATHERING, UNITS, Work, over

PRODUCTS = [(f"{product} bf16", arch) for product in UNITS for arch in ARCHITECTURES]
VARIANTS = [
    (f"{product} {kind}", 90) for product in UNITS for kind in ("fp16", "bf16, parts of tiles")
]
FP32 = [(f"{product} fp32", arch) for product in UNITS for arch in ARCHITECTURES]
MOVING = [(name, arch) for name in ("pack", "pack rows", "unpack") for arch in ARCHITECTURES]


@functools.cache
def works() -> dict[tuple[str, int], Work]:
    found = (Work(**record) for record in counted("sass_skipping"))
    return {(work.kernel, work.architecture): work for work in found}


@pytest.mark.parametrize(("kernel", "architecture"), PRODUCTS + VARIANTS)
def test_product_is_within_its_budget(kernel: str, architecture: int) -> None:
    assert over(works()[kernel, architecture]) == []


@pytest.mark.parametrize(("kernel", "architecture"), FP32)
def test_exact_float32_misses_the_matrix_units_alone(kernel: str, architecture: int) -> None:
    assert over(works()[kernel, architecture]) == ["matrix: none"]


@pytest.mark.parametrize("product", UNITS)
def test_any_size_compiles_and_does_not_spill(product: str) -> None:
    work = works()[f"{product} bf16, any size", 90]
    assert (work.stack, work.local) == (0, 0)
    assert work.matrix > 0


@pytest.mark.parametrize(("kernel", "architecture"), [*MOVING, ("compaction", 90)])
def test_what_moves_weights_does_not_spill(kernel: str, architecture: int) -> None:
    work = works()[kernel, architecture]
    assert (work.stack, work.local) == (0, 0)
    # Half of the threads an SM can hold: enough in flight for a pass that waits for memory alone.
    # A gather of columns loads one by one; everything else goes by 128 bits.
    assert work.registers <= (64 if kernel != "unpack" else 168)
    if kernel != "compaction":
        assert work.stores > 0
        assert work.narrow_stores <= 1  # a partial sum


def test_whole_rows_are_picked_by_wide_loads() -> None:
    rows, columns = works()["pack rows", 90], works()["pack", 90]
    assert rows.wide_loads > 0
    assert rows.narrow_loads <= 4
    assert columns.narrow_loads > 4 * rows.narrow_loads


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_product_that_gathers_is_over_the_budget(architecture: int) -> None:
    kinds = {line.split(":")[0] for line in over(works()[GATHERING, architecture])}
    assert kinds >= {"narrow loads", "copies"}


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("stack", 8, "stack"),
        ("local", 2, "local"),
        ("matrix", 0, "matrix"),
        ("copies", 0, "copies"),
        ("narrow_copies", 1, "narrow copies"),
        ("narrow_loads", 17, "narrow loads"),
        ("stores", 0, "stores"),
        ("narrow_stores", 1, "narrow stores"),
    ],
)
def test_each_limit_can_fail(field: str, value: int, kind: str) -> None:
    worse = dataclasses.replace(works()["y bf16", 90], **{field: value})
    assert [line.split(":")[0] for line in over(worse)] == [kind]
