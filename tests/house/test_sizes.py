"""No file and no function is longer than one can take in."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ROOT

FOLDERS = ("l0fast", "kernels")
MOST_OF_A_FUNCTION = 80
"""Lines, from its `def` to its end, without its docstring and its decorators."""
MOST_OF_A_FILE = 300
"""Lines."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def lines_of(function: Function) -> int:
    """How many lines a function has, but for its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        first = function.body[0]
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def too_long(path: Path) -> Iterator[str]:
    """What is too long in a file, one line each; a method counts like a function."""
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    if lines > MOST_OF_A_FILE:
        yield f"{lines} lines; expected at most {MOST_OF_A_FILE}"
    for node in ast.walk(ast.parse(text, filename=str(path))):
        if isinstance(node, Function) and lines_of(node) > MOST_OF_A_FUNCTION:
            yield f"{node.name}: {lines_of(node)} lines; expected at most {MOST_OF_A_FUNCTION}"


FILES = [
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("file", FILES)
def test_a_file_and_its_functions_are_short_enough(file: str) -> None:
    assert list(too_long(ROOT / file)) == []


def test_every_folder_was_looked_at() -> None:
    assert {"l0fast/__init__.py", "kernels/l0fast_kernels/__init__.py"} <= set(FILES)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def f():\n" + "    x = 1\n" * 79, []),
        ("def f():\n" + "    x = 1\n" * 80, ["f: 81 lines; expected at most 80"]),
        ('def f():\n    """One.\n' + "\n" * 90 + '    """\n' + "    x = 1\n" * 79, []),
        (
            "class A:\n    def g(self):\n" + "        x = 1\n" * 80,
            ["g: 81 lines; expected at most 80"],
        ),
        ("x = 1\n" * 301, ["301 lines; expected at most 300"]),
        ("x = 1\n" * 300, []),
    ],
)
def test_what_is_too_long(text: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text(text)
    assert list(too_long(tmp_path / "x.py")) == found
