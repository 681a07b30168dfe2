"""The words that head an entry of the troubleshooting pages are in a message of the library."""

from __future__ import annotations

import ast
import re

from tests import ROOT

PAGES = sorted((ROOT / "docs").glob("troubleshooting*.md"))
PAGE = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
WITHOUT = " (no message)"
"""Behind the words of an entry that is about no message."""


def messages() -> str:
    """Every text in the code of the library, one a line; what is filled in is left out."""
    found: list[str] = []
    for path in sorted((ROOT / "l0fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [one.value if isinstance(one, ast.Constant) else "" for one in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def entries() -> list[str]:
    """The words in bold, of entries about messages."""
    found = re.findall(r"\*\*([^*]+)\*\*(?=(.{0,20}))", PAGE.replace("\n", " "))
    return [words for words, behind in found if not behind.startswith(WITHOUT)]


def test_every_entry_has_words_of_a_message() -> None:
    known = messages()
    missing = [
        words
        for words in entries()
        if words.removeprefix("expected ") not in known and words.removeprefix("got ") not in known
    ]
    assert missing == []


def test_words_of_no_message_are_seen() -> None:
    assert len(entries()) > 100
    assert "the moon is too far away" not in messages()
