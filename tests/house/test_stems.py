"""One stem, every room: from any file of an op one can type the name of the others.

An op X has its reference in l0fast/maths/X.py, its kernel in kernels/l0fast_kernels/X.py, the tests
of both in tests/maths/test_X.py and tests/kernels/test_kernel_X.py, and its benchmark in
bench/bench_X.py.
"""

from __future__ import annotations

import inspect

import pytest

from l0fast import functional
from tests import ROOT

ROOMS = {
    "reference": "l0fast/maths/{}.py",
    "kernel": "kernels/l0fast_kernels/{}.py",
    "test": "tests/maths/test_{}.py",
    "kernel's test": "tests/kernels/test_kernel_{}.py",
    "bench": "bench/bench_{}.py",
}
NO_OPS = {"__init__", "device_math", "launch"}
"""Files of the kernels' folder that are no op's: what kernels share."""
SAME_OP = {"draw": "hard_concrete"}
"""Doors of l0fast.functional to another one's op."""
ELSEWHERE = {
    # Three kernels, one after the other: there is no fourth, nor a reference but theirs.
    ("skipping_linear", "reference"): "l0fast/autograd/skipping.py",
    ("skipping_linear", "kernel"): "l0fast/autograd/skipping.py",
    ("skipping_linear", "test"): "tests/autograd/test_skipping_linear.py",
    # Nothing else calls these two, and a layer's time is what they are for.
    ("packed_weight", "bench"): "bench/bench_skipping_linear.py",
    ("bounded_matmul", "bench"): "bench/bench_skipping_linear.py",
    # Their one launch is a launch fewer of a step, or several, and nothing by itself.
    ("lagrangian", "bench"): "bench/bench_step.py",
    ("advance", "bench"): "bench/bench_step.py",
    ("gate_adam", "bench"): "bench/bench_step.py",
    # PyTorch's own Adam, and the constraint's term differentiated by autograd.
    ("gate_adam", "reference"): "l0fast/constraints/gate_adam.py",
    ("gate_adam", "test"): "tests/constraints/test_attach.py",
    # gated_weight with a gate for each row or column: the same formulas, with a `dim`.
    ("scaled_weight", "reference"): "l0fast/maths/gated_weight.py",
    ("scaled_weight", "test"): "tests/maths/test_gated_weight.py",
}
"""What is a part of another op: (stem, room) -> the file that has it."""


def ops() -> set[str]:
    """The public ops, those which can choose a backend; and all that have a kernel of their own."""
    doors = {
        SAME_OP.get(name, name)
        for name, function in vars(functional).items()
        if inspect.isfunction(function)
        and function.__module__ == functional.__name__
        and "backend" in inspect.signature(function).parameters
    }
    kernels = {path.stem for path in (ROOT / "kernels" / "l0fast_kernels").glob("*.py")}
    return doors | (kernels - NO_OPS)


def test_the_ops_are_found() -> None:
    assert {"hard_concrete", "gated_weight", "skipping_linear", "scaled_weight"} <= ops()


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("stem", sorted(ops()))
def test_every_op_has_a_file_in_every_room(stem: str, room: str) -> None:
    own = ROOT / ROOMS[room].format(stem)
    if (stem, room) not in ELSEWHERE:
        assert own.is_file()
    else:
        assert not own.exists(), "it has a file of its own: take it out of ELSEWHERE"
        assert (ROOT / ELSEWHERE[stem, room]).is_file()


def test_nothing_is_elsewhere_that_is_no_op() -> None:
    assert {stem for stem, _ in ELSEWHERE} <= ops()
    assert {room for _, room in ELSEWHERE} <= ROOMS.keys()
