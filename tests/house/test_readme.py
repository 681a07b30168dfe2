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
    assert first.report.density <= 0.25
    with torch.no_grad():
        assert torch.equal(first.eval()(names["x"]), loaded.eval()(names["x"]))
    size, whole = (sum(p.numel() for p in part.parameters()) for part in (loaded, names["model"]))
    assert size < whole / 2


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (README.parent / link).exists()] == []
