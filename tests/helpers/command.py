"""The command, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from l0fast import cli


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path under `root`, with its content."""
    paths = sorted(root.rglob("*"))
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in paths}


def run(*arguments: str, main: Callable[[list[str]], int] = cli.main) -> int:
    """The exit code of the command."""
    try:
        return main(list(arguments))
    except SystemExit as stopped:
        return int(stopped.code or 0)


def refused(
    capsys: pytest.CaptureFixture[str],
    *arguments: str,
    main: Callable[[list[str]], int] = cli.main,
    name: str = "l0fast",
) -> str:
    """The one line that the command says before it stops with 2, having changed nothing."""
    before = tree(Path.cwd())
    capsys.readouterr()
    code = run(*arguments, main=main)
    error = capsys.readouterr().err
    assert code == 2, error
    assert tree(Path.cwd()) == before
    assert error.endswith("\n")
    assert error.count("\n") == 1, error
    assert error.startswith(name), error
    return error
