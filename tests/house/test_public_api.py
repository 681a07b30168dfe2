"""The front door: exactly these names, each documented, and nothing heavy behind it."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

import l0fast
from tests import ROOT

PUBLIC = {
    "AugmentedLagrangian",
    "Constraints",
    "DensityConstraint",
    "DualAscent",
    "EqualityAscent",
    "HardConcrete",
    "L0Conv1d",
    "L0Conv2d",
    "L0Conv3d",
    "L0ConvTranspose1d",
    "L0ConvTranspose2d",
    "L0ConvTranspose3d",
    "L0Linear",
    "L0Penalty",
    "LatencyTable",
    "PIControl",
    "TargetSchedule",
    "Trainer",
    "TrainerSettings",
    "__version__",
    "density",
    "frontier",
    "functional",
    "gates",
    "load_pruned",
    "measure_latency",
    "param_groups",
    "prune",
    "prune_optimizer",
    "prune_state_dict",
    "save_pruned",
    "sparsify_",
}
# What only some users have, or need: imported when it is used.
HEAVY = ("triton", "l0fast_kernels", "torchvision", "sklearn", "matplotlib")


def python(code: str) -> str:
    """What `code` prints in an interpreter of its own, in which warnings are errors."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_is_exact() -> None:
    assert len(l0fast.__all__) == len(set(l0fast.__all__))
    assert set(l0fast.__all__) == PUBLIC


def test_no_other_name_is_public() -> None:
    names = {
        name
        for name in dir(l0fast)
        if not name.startswith("_") and not isinstance(getattr(l0fast, name), types.ModuleType)
    }
    assert names == PUBLIC - {"__version__", "functional"}


def test_each_name_is_what_type_checkers_take_it_for() -> None:
    tree = ast.parse((ROOT / "l0fast" / "__init__.py").read_text(encoding="utf-8"))
    homes = {
        alias.name: statement.module
        for statement in ast.walk(tree)
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert homes.pop("functional") == "l0fast"
    assert l0fast.functional is importlib.import_module("l0fast.functional")
    assert set(homes) == PUBLIC - {"__version__", "functional"}
    for name, home in homes.items():
        assert getattr(l0fast, name) is getattr(importlib.import_module(str(home)), name)


def test_a_name_that_is_none() -> None:
    with pytest.raises(AttributeError, match="module 'l0fast' has no attribute 'sparsify'"):
        _ = l0fast.sparsify


def test_nothing_is_loaded_before_it_is_used() -> None:
    """So that the command can answer Ctrl-C while PyTorch is loaded."""
    code = "import sys, l0fast, l0fast.__main__; print('torch' in sys.modules)"
    assert python(code).strip() == "False"


def test_a_module_never_hides_the_function_of_its_name() -> None:
    # Importing l0fast.density binds the module to the package, over the function `density`.
    code = """
import importlib, pkgutil, types, l0fast
for module in pkgutil.iter_modules(l0fast.__path__, "l0fast."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
names = set(l0fast.__all__) - {"functional"}
print(sorted(n for n in names if isinstance(getattr(l0fast, n), types.ModuleType)))
"""
    assert python(code).strip() == "[]"


def test_import_is_light_and_touches_no_gpu() -> None:
    code = f"""
import sys, torch
def touched(*args, **kwargs):
    raise AssertionError("it starts CUDA")
torch.cuda._lazy_init = touched
state = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
from l0fast import *
assert torch.equal(torch.get_rng_state(), state[0]), "it draws from the generator"
assert (torch.get_num_threads(), torch.get_default_dtype()) == state[1:]
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert python(code).strip() == "[]"


@pytest.mark.exhaustive
def test_the_guard_against_touching_a_gpu_can_fail() -> None:
    code = """
import torch
def touched(*args, **kwargs):
    raise AssertionError("touched")
torch.cuda._lazy_init = touched
try:
    torch.zeros(1, device="cuda")
except AssertionError as error:
    print(error)
"""
    assert python(code).strip() == "touched"


def documented() -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of every public class, method and function."""
    for name in sorted(PUBLIC - {"__version__"}):
        value = getattr(l0fast, name, None)
        yield name, value
        if inspect.isclass(value):
            for method, raw in sorted(vars(value).items()):
                if not method.startswith("_") and (
                    inspect.isroutine(raw) or isinstance(raw, (property, classmethod, staticmethod))
                ):
                    yield f"{name}.{method}", getattr(value, method)
        elif inspect.ismodule(value):
            for function, defined in sorted(vars(value).items()):
                if not function.startswith("_") and (
                    getattr(defined, "__module__", None) == value.__name__
                ):
                    yield f"{name}.{function}", defined


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=n) for n, v in documented()])
def test_every_public_name_has_a_docstring(name: str, value: Any) -> None:
    assert value is not None, f"l0fast has no {name}"
    # A class does not get by with its base's docstring, nor with the one a dataclass makes.
    doc = vars(value).get("__doc__") if inspect.isclass(value) else inspect.getdoc(value)
    assert doc, f"{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"{name} has only the docstring that dataclass makes"


def test_the_fused_ops_are_among_what_is_looked_at() -> None:
    names = {name for name, _ in documented()}
    assert {"functional.hard_concrete", "functional.gated_weight"} <= names


def test_version_can_be_read_by_the_build() -> None:
    # hatchling takes it from the text of __init__.py, so it has to stand there as a literal.
    text = (ROOT / "l0fast" / "__init__.py").read_text(encoding="utf-8")
    literal = re.search(r'^__version__ = "(\d+\.\d+\.\d+(?:\.?(?:a|b|rc|dev)\d+)?)"$', text, re.M)
    assert literal, 'l0fast/__init__.py has no line like: __version__ = "0.1.0"'
    assert literal[1] == l0fast.__version__
