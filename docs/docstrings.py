"""Makes the "Equals:" part of docstrings a block of code, before napoleon reads them."""

from __future__ import annotations

import re
from typing import Any

_EQUALS = re.compile(r"^(\s*)(Equals\b.*):$")


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def equals_as_code(lines: list[str]) -> list[str]:
    """The lines of a docstring, with a literal block after each line "Equals ...:"."""
    found: list[str] = []
    rest = iter(lines)
    line = next(rest, None)
    while line is not None:
        start = _EQUALS.match(line)
        found.append(line)
        line = next(rest, None)
        if start is None:
            continue
        found[-1:] = [f"{start[1]}{start[2]}::", ""]
        while line is not None and (not line.strip() or _indent(line) > len(start[1])):
            found.append(line)
            line = next(rest, None)
        found.append("")
    return found


def _process(_app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    lines[:] = equals_as_code(lines)


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _process, priority=100)  # napoleon's is 500
    return {"parallel_read_safe": True}
