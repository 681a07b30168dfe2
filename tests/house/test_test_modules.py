"""What test modules share lies in helpers: none imports another, and no helper is a test module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

MODULES = sorted((ROOT / "tests").rglob("*.py"))


def of_test_modules(text: str) -> Iterator[str]:
    """The test modules that a module imports."""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            rooms = name.split(".")
            if rooms[0] == "tests" and any(part.startswith("test_") for part in rooms[1:3]):
                yield name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_module_imports_a_test_module(path: Path) -> None:
    assert list(of_test_modules(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from tests.pruning.test_prune import a", ["tests.pruning.test_prune.a"]),
        ("from tests.pruning import test_prune", ["tests.pruning.test_prune"]),
        ("import tests.pruning.test_prune as other", ["tests.pruning.test_prune"]),
        ("from tests.helpers.runs import test_data_of_a_run", []),
        ("from l0fast.tests.pruning import test_prune", []),
    ],
)
def test_imports_are_seen(text: str, found: list[str]) -> None:
    assert list(of_test_modules(text)) == found
