"""Each example runs as it stands, and ends with an accurate model within its target."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TARGETS = {
    "plain": (0.25, 0.87, ()),
    "accelerate": (0.25, 0.88, ("accelerate",)),
    "lightning": (0.25, 0.86, ("lightning",)),
    "timm": (0.2, 0.82, ("timm",)),
    "transformers": (0.2, 0.84, ("transformers", "accelerate")),
}
"""Share of the parameters; accuracy, a little below the lowest of five seeds; what it needs."""


def test_each_is_short_and_has_a_target() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(f"loop_{name}" for name in TARGETS)
    for path in EXAMPLES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40, path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_it_runs(name: str, tmp_path: Path) -> None:
    target, least, needs = TARGETS[name]
    for package in needs:
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"loop_{name}.py")],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
        | {"OMP_NUM_THREADS": "1"},  # beside the other tests
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    found = re.fullmatch(r"accuracy (0\.\d+), parameters (\d+) -> (\d+)", last)
    assert found, last
    accuracy, before, after = (float(one) for one in found.groups())
    assert 0.9 * target * before < after <= target * before, last
    assert accuracy > least, last
    assert (tmp_path / "small.safetensors").is_file()
