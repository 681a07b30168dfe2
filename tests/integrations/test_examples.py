"""Each example runs as it stands, and ends with an accurate model within its target."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests import ROOT
from tests.helpers.thinned import telling


class Wanted(NamedTuple):
    """What an example's last line must say."""

    target: float
    """Share of what it names, or the amount itself."""
    quality: float
    """Accuracy, a little below the lowest of five seeds; or the largest loss."""
    needs: tuple[str, ...] = ()
    saves: bool = False


WANTED = {
    "loop_plain": Wanted(0.25, 0.87, saves=True),
    "loop_accelerate": Wanted(0.25, 0.88, ("accelerate",), saves=True),
    "loop_lightning": Wanted(0.25, 0.86, ("lightning",), saves=True),
    "loop_timm": Wanted(0.2, 0.82, ("timm",), saves=True),
    "loop_transformers": Wanted(0.2, 0.84, ("transformers", "accelerate"), saves=True),
    "resnet_macs": Wanted(1 / 3, 0.85, ("torchvision",)),
    "vit_latency": Wanted(0.5, 0.8, ("torchvision",)),
    "decoder_params": Wanted(150_000, 2.1, ("transformers",)),
    "decoder_trainer": Wanted(75_000, 2.9, ("transformers", "accelerate")),
    "encoder_classifier": Wanted(0.5, 0.58, ("transformers",)),
    "tabular_inputs": Wanted(1 / 3, 0.93),
    "single_weights": Wanted(0.1, 0.86),
}
ALWAYS = [
    *("loop_plain", "resnet_macs", "vit_latency"),
    *("decoder_params", "tabular_inputs", "single_weights"),
]
"""The others run in `make test-all`, and as pages of the site in `make docs`."""
LAST = re.compile(r"(accuracy|loss) ([\d.]+), [a-zA-Z ]+ ([\d.]+) -> ([\d.]+)")
EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py")}


def test_each_is_short_and_has_a_target() -> None:
    assert EXAMPLES.keys() == WANTED.keys()
    for name, path in EXAMPLES.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 60, name


@pytest.mark.slow
@pytest.mark.parametrize("name", telling(WANTED, ALWAYS))
def test_it_runs(name: str, tmp_path: os.PathLike[str]) -> None:
    wanted = WANTED[name]
    for package in wanted.needs:
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES[name])],
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
    found = LAST.fullmatch(last)
    assert found, last
    quality, before, after = (float(one) for one in found.groups()[1:])
    limit = wanted.target if wanted.target > 1 else wanted.target * before
    assert 0.9 * limit < after <= limit, last
    better = quality > wanted.quality if found[1] == "accuracy" else quality < wanted.quality
    assert better, last
    assert os.path.isfile(os.path.join(tmp_path, "small.safetensors")) == wanted.saves
