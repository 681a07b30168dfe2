"""The README's code runs as it stands there, its links lead somewhere, and it stays short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONGEST = {"README.md": 150}


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, str(README), "exec"), names)
    small, x, y = names["small"].eval(), names["x"], names["y"]
    kept, whole = small.report.params
    assert 0.2 < kept / whole <= 0.25
    assert sum(p.numel() for p in small.parameters()) == kept
    with torch.no_grad():
        assert (small(x).argmax(1) == y)[1400:].float().mean() > 0.86


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_is_long(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST.get(page.name, 250)


def test_its_links_lead_somewhere() -> None:
    links = [link for page in PAGES[:2] for link in re.findall(r"\]\(([^)#]+)\)", page.read_text())]
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (README.parent / link).exists()] == []
