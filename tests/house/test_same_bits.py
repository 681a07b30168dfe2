"""A training with the same seed ends with the same bits as when same_bits.json was written."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT
from tests.helpers.thinned import telling
from tests.house.same_bits import PATH, TRAININGS

CLOSE = {
    "mean_loss": 0.05,
    "last_loss": 0.2,
    "mean_log_alpha": 0.1,
    "expected_density": 0.05,
    "pruned_parameters": 0.15,
    "pruned_norm": 0.15,
    "multipliers": 0.15,
}
"""How far a number may be off, as a share of it, on a machine that rounds otherwise: small
differences grow in a training, and a gate near its threshold falls on the other side."""


KEPT = (
    "mlp, skipped",
    "mlp, masked",
    "mlp, gates on weights",
    "lenet, MACs",
    "stream, skipped",
    "encoder",
    "trainer, shrunk",
    "trainer, augmented",
)
"""One for each part of the method; the others run in `make test-all`."""
OTHERS = tuple(name for name in TRAININGS if name not in KEPT)


@functools.cache
def found(names: tuple[str, ...]) -> dict[str, Any]:
    """What this machine finds, in a process of its own: other tests leave no mark on it."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.house.same_bits", *names],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return json.loads(PATH.read_text(encoding="utf-8"))


def test_every_training_was_written(written: dict[str, Any]) -> None:
    assert list(written["trainings"]) == list(TRAININGS)


@pytest.mark.parametrize("name", telling(TRAININGS, KEPT))
def test_a_training_ends_with_the_same_bits(name: str, written: dict[str, Any]) -> None:
    here = found(KEPT if name in KEPT else OTHERS)
    now, before = here["trainings"][name], written["trainings"][name]
    if here["canary"] == written["canary"]:
        assert now == before
        return
    # A plain training differs here, too: the bits say nothing, the numbers still do.
    assert now["numbers"].keys() == before["numbers"].keys() == CLOSE.keys()
    for key, share in CLOSE.items():
        assert now["numbers"][key] == pytest.approx(before["numbers"][key], rel=share, abs=0.01)


def test_skipping_and_masking_end_with_nearly_the_same() -> None:
    """The recorded trainings are worth something: with and without skipping they agree."""
    skipped = found(KEPT)["trainings"]["mlp, skipped"]["numbers"]
    masked = found(KEPT)["trainings"]["mlp, masked"]["numbers"]
    assert skipped["mean_loss"] == pytest.approx(masked["mean_loss"], rel=1e-3)
