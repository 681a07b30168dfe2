"""Imports run strictly downward, and every module has a level."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

# A room may import those on lower levels only; within a room, imports form no circle.
LEVELS: dict[str, int] = {
    "_checks": 0,
    "_digest": 0,
    "_extras": 0,
    "_files": 0,
    "_metrics": 0,
    "_tables": 0,
    "_warnings": 0,
    "maths": 1,
    "autograd": 2,
    "functional": 3,
    "layers": 4,
    "graph": 5,
    "skipping": 6,
    "gating": 7,
    "measures": 8,
    "pruning": 9,
    "constraints": 10,
    "data": 11,
    "plots": 11,
    "training": 12,
    "integrations": 12,
    "commands": 13,
    "cli": 14,
    "__init__": 15,
    "__main__": 16,
}
# The binding alone knows that there are kernels.
KNOWS_THE_KERNELS = {"autograd"}


def rooms(package: Path) -> dict[str, list[Path]]:
    """The files of each room, a module or a folder of modules directly in `package`."""
    found: dict[str, list[Path]] = {}
    for path in sorted(package.rglob("*.py")):
        found.setdefault(path.relative_to(package).parts[0].removesuffix(".py"), []).append(path)
    return found


def imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that `path` imports, wherever in it the import stands.

    `from a import b` gives "a.b", whether b is a module or a name in one.
    """
    package = list(path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0]
            if (
                called in {"import_module", "__import__"}
                and isinstance(name, ast.Constant)
                and isinstance(name.value, str)
            ):
                yield node.lineno, name.value


def circles(root: Path, room: str, paths: list[Path]) -> list[str]:
    """A line if the modules of a room import each other in a circle."""
    modules = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    left: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name for _, name in imports(path, root)}
        # `from a import b` may name a module, or a name in one.
        names |= {name.rpartition(".")[0] for name in names}
        left[module] = names & modules.keys() - {module}
    while free := [module for module, imported in left.items() if not imported & left.keys()]:
        for module in free:
            del left[module]
    return [f"l0fast/{room}: a circle among {', '.join(sorted(left))}"] if left else []


def problems(root: Path) -> list[str]:
    """What breaks the plan in the tree at `root`, one line each."""
    found: list[str] = []
    house = rooms(root / "l0fast")
    for room, paths in house.items():
        if room not in LEVELS:
            found.append(
                f"l0fast/{room}: has no level; give it one in tests/house/test_layering.py"
            )
            continue
        for path in paths:
            for line, name in imports(path, root):
                where = f"{path.relative_to(root)}:{line}"
                top, _, rest = name.partition(".")
                if top in {"l0fast_kernels", "triton"} and room not in KNOWS_THE_KERNELS:
                    found.append(f"{where}: imports {name}; only the binding may")
                if top in {"bench", "tests"}:
                    found.append(f"{where}: the library imports {top}")
                if top != "l0fast":
                    continue
                # What is no module is a name that __init__ gives.
                target = rest.split(".")[0]
                target = target if target in LEVELS or target in house else "__init__"
                if target == room or target not in LEVELS:
                    continue
                if LEVELS[target] < LEVELS[room]:
                    continue
                found.append(
                    f"{where}: {room} (level {LEVELS[room]}) imports "
                    f"{target} (level {LEVELS[target]})"
                )
        found += circles(root, room, paths)
    kernels = root / "kernels" / "l0fast_kernels"
    for path in sorted(kernels.rglob("*.py")):
        for line, name in imports(path, root / "kernels"):
            if name.partition(".")[0] == "l0fast":
                found.append(f"{path.relative_to(root)}:{line}: a kernel imports l0fast")
    if (root / "kernels" / "__init__.py").exists():
        found.append("kernels/__init__.py: kernels/ is a folder, not a package")
    return found


def test_imports_run_downward() -> None:
    assert "__init__" in rooms(ROOT / "l0fast")  # else the walk looked at nothing
    assert problems(ROOT) == []


GOOD = {
    "l0fast/__init__.py": "from l0fast.layers.gated import L0Linear\n__version__ = '1'\n",
    "l0fast/__main__.py": "from l0fast.cli import main\n",
    "l0fast/_checks.py": "import math\n",
    "l0fast/maths/hard_concrete.py": "import torch\nfrom l0fast import _checks\n",
    "l0fast/maths/philox.py": "from l0fast.maths.hard_concrete import LIMIT\n",
    "l0fast/autograd.py": "def launch():\n    import l0fast_kernels.hard_concrete\n",
    "l0fast/layers/draw.py": "from .. import autograd\nfrom .._checks import number\n",
    "l0fast/layers/gated.py": "from . import draw\n",
    "l0fast/cli.py": "import l0fast.layers\nfrom l0fast.data import sets\n",
    "l0fast/data/sets.py": "",
    "l0fast/plots/dynamics.py": "from ..layers.gated import L0Linear\n",
    "kernels/l0fast_kernels/__init__.py": "",
    "kernels/l0fast_kernels/device_math.py": "import triton\n",
    "kernels/l0fast_kernels/hard_concrete.py": "from . import device_math\n",
}
BAD = {
    "upward": (
        "l0fast/_checks.py",
        "from l0fast.layers.gated import L0Linear",
        "_checks (level 0)",
    ),
    "upward, relative": ("l0fast/_checks.py", "from .layers import x", "imports layers (level 4)"),
    "upward, module": ("l0fast/_checks.py", "from l0fast import autograd", "autograd (level 2)"),
    "upward, plain": ("l0fast/layers/draw.py", "import l0fast.cli", "imports cli (level 14)"),
    "upward, in a function": (
        "l0fast/layers/draw.py",
        "def f():\n    import l0fast.cli",
        "draw.py:2",
    ),
    "upward, by string": (
        "l0fast/layers/draw.py",
        "import importlib\nimportlib.import_module('l0fast.cli')",
        "layers/draw.py:2: layers (level 4) imports cli",
    ),
    "through the front door": ("l0fast/cli.py", "from l0fast import L0Linear", "imports __init__"),
    "the front door, relative": (
        "l0fast/plots/dynamics.py",
        "from .. import L0Linear",
        "plots/dynamics.py:1: plots (level 11) imports __init__",
    ),
    "the whole package": ("l0fast/layers/draw.py", "import l0fast", "imports __init__ (level 15)"),
    "sideways": (
        "l0fast/data/sets.py",
        "from l0fast.plots import x",
        "data (level 11) imports plots",
    ),
    "a circle of two": (
        "l0fast/layers/draw.py",
        "def f():\n    from l0fast.layers import gated",
        "l0fast/layers: a circle among l0fast.layers.draw, l0fast.layers.gated",
    ),
    "a circle, by a name": (
        "l0fast/maths/hard_concrete.py",
        "from l0fast.maths.philox import words",
        "l0fast/maths: a circle among l0fast.maths.hard_concrete, l0fast.maths.philox",
    ),
    "no level": ("l0fast/utils.py", "", "l0fast/utils: has no level"),
    "no level, a folder": ("l0fast/misc/__init__.py", "", "l0fast/misc: has no level"),
    "kernels outside the binding": (
        "l0fast/layers/draw.py",
        "import l0fast_kernels",
        "only the binding",
    ),
    "triton outside the binding": (
        "l0fast/layers/draw.py",
        "def f():\n    from triton import language",
        "layers/draw.py:2: imports triton.language",
    ),
    "a kernel imports the house": (
        "kernels/l0fast_kernels/device_math.py",
        "from l0fast.maths.philox import words",
        "a kernel imports l0fast",
    ),
    "the library imports measurements": (
        "l0fast/cli.py",
        "def f():\n    from bench.poster import plan",
        "cli.py:2: the library imports bench",
    ),
    "kernels is a package": ("kernels/__init__.py", "", "not a package"),
}


def build(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_a_good_tree_passes(tmp_path: Path) -> None:
    build(tmp_path, GOOD)
    assert problems(tmp_path) == []


@pytest.mark.parametrize("case", BAD)
def test_a_bad_tree_fails(case: str, tmp_path: Path) -> None:
    name, text, expected = BAD[case]
    build(tmp_path, GOOD | {name: text})
    found = problems(tmp_path)
    assert len(found) == 1, found
    assert expected in found[0]
