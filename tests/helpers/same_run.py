"""Whether two runs left the same: what a resumed run is compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast._digest import KEY, check_json
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import METRICS, PLOT, PRUNED, SUMMARY
from l0fast.training.tensorboard import TENSORBOARD


class Stop(Exception):
    """Stands for whatever ends a process."""


def read_scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) in the order written, as TensorBoard shows the folder of a run."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    events: Any = pytest.importorskip(name).EventAccumulator(
        str(out / TENSORBOARD), size_guidance={"scalars": 0}
    )
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def assert_same(got: Any, wanted: Any, where: str = "") -> None:
    """Equal throughout, tensors bit for bit."""
    assert type(got) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert got.dtype == wanted.dtype, where
        assert torch.equal(got, wanted), where
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted), where
        for key in wanted:
            assert_same(got[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(got) == len(wanted), where
        for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    else:
        assert got == wanted, where


def state(out: Path) -> dict[str, Any]:
    """What a checkpoint holds, without the time it took."""
    loaded = torch.load(out / CHECKPOINT, weights_only=True)
    return {key: value for key, value in loaded.items() if key != "seconds"}


def summary(out: Path) -> dict[str, Any]:
    """The summary, without the time it took."""
    loaded = json.loads((out / SUMMARY).read_text())
    check_json(loaded)
    return {k: v for k, v in loaded.items() if k != KEY and not k.endswith("seconds")}


def pruned(out: Path) -> tuple[Any, bytes]:
    """The header and the tensors of the pruned model; safetensors orders its metadata at random."""
    content = (out / PRUNED).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def assert_same_run(out: Path, wanted: Path) -> None:
    """Two folders hold the same run: weights, optimizer, multipliers, noise, metrics, summary."""
    assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in wanted.iterdir())
    assert_same(state(out), state(wanted))
    assert_same(summary(out), summary(wanted))
    for name in {METRICS, PLOT} & {path.name for path in wanted.iterdir()}:
        assert (out / name).read_bytes() == (wanted / name).read_bytes(), name
    if (wanted / PRUNED).exists():
        assert pruned(out) == pruned(wanted)
    if (wanted / TENSORBOARD).exists():
        assert read_scalars(out) == read_scalars(wanted)
    if (wanted / "dense").exists():
        assert_same_run(out / "dense", wanted / "dense")
