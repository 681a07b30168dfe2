"""Imports run strictly downward, and every module has a level."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module, or a folder of modules, may import those on lower levels only.
LEVELS: dict[str, int] = {
    "_checks": 0,
    "_files": 0,
    "_tables": 0,
    "amounts": 1,
    "latency": 1,
    "philox": 0,
    "hard_concrete": 0,
    "gated_weight": 0,
    "compaction": 0,
    "packed_weight": 0,
    "bounded_matmul": 0,
    "autograd": 1,
    "functional": 2,
    "formats": 1,
    "attention": 4,
    "draw": 3,
    "layers": 3,
    "channels": 1,
    "graph": 2,
    "sites": 3,
    "walk": 3,
    "sparsify": 4,
    "density": 4,
    "recipes": 4,
    "liveness": 4,
    "links": 4,
    "skip": 4,
    "following": 4,
    "skip_on_device": 4,
    "proof": 4,
    "measure": 5,
    "compact": 5,
    "checkpoint": 5,
    "cuda_graph": 5,
    "dual": 5,
    "schedule": 5,
    "stall": 5,
    "data": 5,
    "models": 5,
    "plots": 5,
    "plots_poster": 6,
    "plots_frontier": 6,
    "frontier": 10,
    "results": 5,
    "mend": 6,
    "settings": 6,
    "tensorboard": 5,
    "budget": 6,
    "settle": 6,
    "counts": 6,
    "stopwatch": 1,
    "trial": 6,
    "timing": 6,
    "products": 6,
    "plan": 6,
    "hinges": 6,
    "footprint": 6,
    "constraint": 6,
    "carry": 7,
    "constraints": 7,
    "folder": 6,
    "prune": 6,
    "saving": 6,
    "summary": 7,
    "magnitude": 7,
    "shrink": 7,
    "metrics": 8,
    "method": 8,
    "trainer": 9,
    "commands": 11,
    "cli": 12,
    "__init__": 13,
    "__main__": 14,
}
# The only imports within a level: (who, whom). Together they must not form a circle.
WITHIN_A_LEVEL: set[tuple[str, str]] = {
    ("philox", "_checks"),
    ("hard_concrete", "_checks"),
    ("gated_weight", "_checks"),
    ("gated_weight", "hard_concrete"),
    ("layers", "draw"),
    ("sites", "draw"),
    ("recipes", "liveness"),
    ("sparsify", "attention"),
    ("links", "proof"),
    ("skip", "proof"),
    ("sparsify", "skip"),
    ("links", "skip"),
    ("skip", "skip_on_device"),
    ("skip", "following"),
    ("links", "following"),
    ("sparsify", "following"),
    ("links", "skip_on_device"),
    ("packed_weight", "compaction"),
    ("bounded_matmul", "compaction"),
    ("sparsify", "links"),
    ("density", "sparsify"),
    ("walk", "sites"),
    ("sparsify", "recipes"),
    ("plan", "mend"),
    ("hinges", "plan"),
    ("footprint", "hinges"),
    ("counts", "plan"),
    ("trial", "plan"),
    ("trial", "counts"),
    ("timing", "trial"),
    ("timing", "plan"),
    ("footprint", "products"),
    ("footprint", "counts"),
    ("footprint", "trial"),
    ("constraint", "timing"),
    ("constraint", "trial"),
    ("prune", "counts"),
    ("prune", "trial"),
    ("prune", "timing"),
    ("constraint", "footprint"),
    ("constraint", "budget"),
    ("constraint", "settle"),
    ("settle", "budget"),
    ("prune", "budget"),
    ("prune", "plan"),
    ("prune", "footprint"),
    ("prune", "constraint"),
}
# The binding alone knows that there are kernels.
KNOWS_THE_KERNELS = {"autograd"}


def rooms(package: Path) -> dict[str, list[Path]]:
    """The files of each module or folder of modules directly in `package`."""
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


def problems(root: Path) -> list[str]:
    """What breaks the plan in the tree at `root`, one line each."""
    found: list[str] = []
    house = rooms(root / "l0fast")
    for room, paths in house.items():
        if room not in LEVELS:
            found.append(f"l0fast/{room}: has no level; give it one in tests/test_layering.py")
            continue
        for path in paths:
            for line, name in imports(path, root):
                where = f"{path.relative_to(root)}:{line}"
                top, _, rest = name.partition(".")
                if top in {"l0fast_kernels", "triton"} and room not in KNOWS_THE_KERNELS:
                    found.append(f"{where}: imports {name}; only the binding may")
                if top != "l0fast":
                    continue
                # What is no module is a name that __init__ gives.
                target = rest.split(".")[0]
                target = target if target in LEVELS or target in house else "__init__"
                if target == room or target not in LEVELS:
                    continue
                if LEVELS[target] < LEVELS[room] or (room, target) in WITHIN_A_LEVEL:
                    continue
                found.append(
                    f"{where}: {room} (level {LEVELS[room]}) imports "
                    f"{target} (level {LEVELS[target]})"
                )
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


def test_exceptions_stay_within_a_level_and_form_no_circle() -> None:
    assert all(LEVELS[who] == LEVELS[whom] for who, whom in WITHIN_A_LEVEL)
    left = set(WITHIN_A_LEVEL)
    while left:
        importers = {who for who, _ in left}
        free = {pair for pair in left if pair[1] not in importers}
        assert free, f"a circle among {sorted(left)}"
        left -= free


GOOD = {
    "l0fast/__init__.py": "from l0fast.layers import L0Linear\n__version__ = '1'\n",
    "l0fast/__main__.py": "from l0fast.cli import main\n",
    "l0fast/_checks.py": "import math\n",
    "l0fast/hard_concrete.py": "import torch\nfrom l0fast import _checks\n",
    "l0fast/autograd.py": "def launch():\n    import l0fast_kernels.hard_concrete\n",
    "l0fast/layers.py": "from . import autograd\nfrom ._checks import number\n",
    "l0fast/cli.py": "import l0fast.layers\nfrom l0fast import data, models\n",
    "l0fast/data.py": "",
    "l0fast/models/__init__.py": "from .lenet import LeNet\nfrom ..layers import L0Linear\n",
    "l0fast/models/lenet.py": "from l0fast.models import blocks\n",
    "l0fast/models/blocks.py": "",
    "kernels/l0fast_kernels/__init__.py": "",
    "kernels/l0fast_kernels/device_math.py": "import triton\n",
    "kernels/l0fast_kernels/hard_concrete.py": "from . import device_math\n",
}
BAD = {
    "upward": ("l0fast/_checks.py", "from l0fast.layers import L0Linear", "_checks (level 0)"),
    "upward, relative": ("l0fast/_checks.py", "from .layers import x", "imports layers (level 3)"),
    "upward, module": ("l0fast/_checks.py", "from l0fast import autograd", "autograd (level 1)"),
    "upward, plain": ("l0fast/layers.py", "import l0fast.cli", "imports cli (level 12)"),
    "upward, in a function": ("l0fast/layers.py", "def f():\n    import l0fast.cli", "layers.py:2"),
    "upward, by string": (
        "l0fast/layers.py",
        "import importlib\nimportlib.import_module('l0fast.cli')",
        "layers.py:2: layers (level 3) imports cli",
    ),
    "upward, from a folder": (
        "l0fast/models/lenet.py",
        "from .. import L0Linear",
        "models/lenet.py:1: models (level 5) imports __init__",
    ),
    "through the front door": ("l0fast/cli.py", "from l0fast import L0Linear", "imports __init__"),
    "the whole package": ("l0fast/layers.py", "import l0fast", "imports __init__ (level 13)"),
    "sideways": ("l0fast/data.py", "from l0fast.models import x", "data (level 5) imports models"),
    "no level": ("l0fast/utils.py", "", "l0fast/utils: has no level"),
    "no level, a folder": ("l0fast/misc/__init__.py", "", "l0fast/misc: has no level"),
    "kernels outside the binding": (
        "l0fast/layers.py",
        "import l0fast_kernels",
        "only the binding",
    ),
    "triton outside the binding": (
        "l0fast/layers.py",
        "def f():\n    from triton import language",
        "layers.py:2: imports triton.language",
    ),
    "a kernel imports the house": (
        "kernels/l0fast_kernels/device_math.py",
        "from l0fast.philox import words",
        "a kernel imports l0fast",
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
