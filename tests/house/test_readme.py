"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT

README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    pruned: list[Any] = []
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
        pruned.append(names["small"])
    first, loaded, *_ = pruned
    assert first is not loaded
    kept, whole = first.report.params
    assert 0.2 < kept / whole <= 0.25
    assert sum(p.numel() for p in loaded.parameters()) == kept
    assert names["accuracy"] > 0.88  # .93 to .95; the rest is chance
    with torch.no_grad():
        assert torch.equal(first.eval()(names["x"]), loaded.eval()(names["x"]))


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (README.parent / link).exists()] == []
