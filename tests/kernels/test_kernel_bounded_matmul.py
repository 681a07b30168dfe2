"""The kernel of l0fast_kernels.bounded_matmul, against float64 truth and the reference; and what it
is compiled to, with no GPU: matrix units, wide loads, no spills."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from l0fast import functional
from l0fast.maths.bounded_matmul import bounded_matmul
from l0fast.maths.compaction import MULTIPLE
from tests.helpers.interpreter import DEVICE, kernel_test
from tests.helpers.once import once_a_run
from tests.helpers.thinned import telling, thinned_product
from tests.helpers.tolerance import assert_no_more_wrong
from tests.kernels.kernel_checks import assert_written, guarded
from tests.kernels.sass import ARCHITECTURES, counted
from tests.kernels.sass_skipping import GATHERING, UNITS, Work, over

PRODUCTS = [(f"{product} bf16", arch) for product in UNITS for arch in ARCHITECTURES]
VARIANTS = [
    (f"{product} {kind}", 90) for product in UNITS for kind in ("fp16", "bf16, parts of tiles")
]
FP32 = [(f"{product} fp32", arch) for product in UNITS for arch in ARCHITECTURES]
MOVING = [(name, arch) for name in ("pack", "pack rows", "unpack") for arch in ARCHITECTURES]


SHAPES = [(64, 128, 192), (70, 130, 90), (1, 1, 1), (33, 7, 200)]
# tl.dot of bfloat16 is wrong in the interpreter: it is compiled ahead of time by the budgets.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@kernel_test
@pytest.mark.parametrize(
    ("shape", "bounded", "part", "dtype"),
    thinned_product(5, SHAPES, ["", "n", "k", "nk"], [0.0, 0.4, 1.0], DTYPES),
    ids=str,
)
def test_no_more_wrong_than_the_reference(
    shape: tuple[int, int, int],
    bounded: str,
    part: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from l0fast_kernels import bounded_matmul_forward, launch

    m, n, k = shape
    every = dict(zip("nk", functional.compaction(torch.rand(n + k) < part, (n, k)), strict=True))
    orders = {name: every[name] for name in bounded}
    a, b, bias = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.randn(n).to(dtype)
    n_count, k_count = (orders[name].count.to(DEVICE) if name in orders else None for name in "nk")
    index = orders["n"].index.to(DEVICE) if "n" in orders else None
    with guarded(launch, monkeypatch):
        got = bounded_matmul_forward(
            a.to(DEVICE), b.to(DEVICE), None, n_count, k_count, MULTIPLE, bias.to(DEVICE), index
        )
    assert_written(got)
    reference = bounded_matmul(a, b, **orders, bias=bias)
    truth = bounded_matmul(a.double(), b.double(), **orders, bias=bias.double())
    terms = bounded_matmul(a.double().abs(), b.double().abs(), **orders, bias=bias.double().abs())
    # A sum in another order errs by a few more.
    assert_no_more_wrong(got.cpu(), reference, truth, magnitude=terms, roundings=8, name="out")
    assert bool((got.cpu()[truth == 0] == 0).all())


@functools.cache
def works(architecture: int) -> dict[str, Work]:
    """By kernel."""
    name = "sass_skipping"
    found = once_a_run(f"{name}_{architecture}", lambda: counted(name, architecture))
    return {work.kernel: work for work in (Work(**record) for record in found)}


def of_one(cases: list[tuple[str, int]]) -> list[Any]:
    """The other architectures run in `make test-all`."""
    return telling(cases, [case for case in cases if case[1] == 90])


@pytest.mark.parametrize(("kernel", "architecture"), of_one(PRODUCTS + VARIANTS))
def test_product_is_within_its_budget(kernel: str, architecture: int) -> None:
    assert over(works(architecture)[kernel]) == []


@pytest.mark.parametrize(("kernel", "architecture"), of_one(FP32))
def test_exact_float32_misses_the_matrix_units_alone(kernel: str, architecture: int) -> None:
    assert over(works(architecture)[kernel]) == ["matrix: none"]


@pytest.mark.parametrize("product", UNITS)
def test_any_size_compiles_and_does_not_spill(product: str) -> None:
    work = works(90)[f"{product} bf16, any size"]
    assert (work.stack, work.local) == (0, 0)
    assert work.matrix > 0


@pytest.mark.parametrize(("kernel", "architecture"), of_one([*MOVING, ("compaction", 90)]))
def test_what_moves_weights_does_not_spill(kernel: str, architecture: int) -> None:
    work = works(architecture)[kernel]
    assert (work.stack, work.local) == (0, 0)
    # Half of the threads an SM can hold: enough in flight for a pass that waits for memory alone.
    # A gather of columns loads one by one; everything else goes by 128 bits.
    assert work.registers <= (64 if kernel != "unpack" else 168)
    if kernel != "compaction":
        assert work.stores > 0
        assert work.narrow_stores <= 1  # a partial sum


def test_whole_rows_are_picked_by_wide_loads() -> None:
    rows, columns = works(90)["pack rows"], works(90)["pack"]
    assert rows.wide_loads > 0
    assert rows.narrow_loads <= 4
    assert columns.narrow_loads > 4 * rows.narrow_loads


@pytest.mark.parametrize("architecture", telling(ARCHITECTURES, [90]))
def test_a_product_that_gathers_is_over_the_budget(architecture: int) -> None:
    kinds = {line.split(":")[0] for line in over(works(architecture)[GATHERING])}
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
    worse = dataclasses.replace(works(90)["y bf16"], **{field: value})
    assert [line.split(":")[0] for line in over(worse)] == [kind]
