"""Checkpoints: written and read whole, or refused. (Whole runs: test_resume.py.)"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from l0fast.training.checkpoint import CHECKPOINT, Checkpoint
from l0fast.training.generators import host_rng, rng_state

CPU = torch.device("cpu")


def checkpoint(model: nn.Module, **changes: Any) -> Checkpoint:
    """One of a model after its second epoch."""
    entries: dict[str, Any] = {
        "identity": {"dataset": "digits", "lr": 0.1},
        "epoch": 2,
        "step": 20,
        "seconds": 1.5,
        "history": [{"epoch": 1}, {"epoch": 2}],
        "model": model.state_dict(),
        "optimizer": {"state": {}},
        "term": None,
        **rng_state(CPU),
    }
    return Checkpoint(**entries | changes)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    path = tmp_path / CHECKPOINT
    checkpoint(model).write(path)
    # Plain tensors and numbers: safe to load, and no CUDA state where there was no CUDA.
    state = torch.load(path, weights_only=True)
    assert list(state) == [
        "format", "identity", "epoch", "step", "seconds", "history", "model", "optimizer", "term",
        "rng", "host_rng",
    ]  # fmt: skip
    read = Checkpoint.read(path, CPU)
    for name in ("identity", "epoch", "step", "seconds", "history", "optimizer", "term", "format"):
        assert getattr(read, name) == getattr(checkpoint(model), name), name
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.model[name], tensor)
    read.refuse_other(path, {"lr": 0.1, "dataset": "digits"}, nn.Linear(3, 2))


def test_the_generators_go_back(tmp_path: Path) -> None:
    """Of torch, Python and NumPy; between the two normal numbers that are made at once, too."""

    def drawn() -> list[Any]:
        numbers = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*torch.rand(5).tolist(), *numbers]

    for _ in range(3):
        checkpoint(nn.Linear(3, 2)).write(tmp_path / CHECKPOINT)
        wanted = drawn()
        drawn()
        Checkpoint.read(tmp_path / CHECKPOINT, CPU).restore_rng(CPU)
        assert drawn() == wanted
    earlier = replace(checkpoint(nn.Linear(3, 2)), host_rng=None)
    random.seed(7)
    wanted = random.random()
    random.seed(7)
    earlier.restore_rng(CPU)  # it says nothing of Python's
    assert random.random() == wanted


def test_another_generator_of_numpy_is_not_saved() -> None:
    module: Any = np.random
    before = module.get_bit_generator()
    module.set_bit_generator(np.random.PCG64(1))
    try:
        assert host_rng().keys() == {"python"}
    finally:
        module.set_bit_generator(before)


@pytest.mark.parametrize(
    ("identity", "model", "message"),
    [
        ({"dataset": "digits", "lr": 0.2}, nn.Linear(3, 2), "lr: got 0.2; expected 0.1, as in"),
        ({"dataset": "digits"}, nn.Linear(3, 2), "lr: got None; expected 0.1, as in"),
        (
            {"dataset": "digits", "lr": 0.1, "seed": 1},
            nn.Linear(3, 2),
            "seed: got 1; expected a run without it (an earlier",
        ),
        (
            {"dataset": "digits", "lr": 0.1},
            nn.Linear(3, 4),
            "model.weight: got '(4, 3)'; expected shape (2, 3), as in",
        ),
        (
            {"dataset": "digits", "lr": 0.1},
            nn.Linear(3, 2, bias=False),
            "model.bias: got 'none'; expected shape (2,), as in",
        ),
    ],
)
def test_another_run_is_refused(identity: Any, model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=r"as in the checkpoint where$") as caught:
        checkpoint(nn.Linear(3, 2)).refuse_other(Path("where"), identity, model)
    assert str(caught.value).startswith(message)


def test_what_an_earlier_version_did_without_saying_so(tmp_path: Path) -> None:
    """Its runs go on, where the settings that it did not know are at what it did."""
    saved = checkpoint(nn.Linear(3, 2))
    ours = {"dataset": "digits", "lr": 0.1, "augment": "none", "settle": 0.0}
    saved.refuse_other_run(Path("where"), ours)
    with pytest.raises(ValueError, match=r"^augment: got 'crop'; expected 'none', as in the check"):
        saved.refuse_other_run(Path("where"), ours | {"augment": "crop"})
    with pytest.raises(ValueError, match=r"^settle: got 0\.1; expected 0\.0, as in the check"):
        saved.refuse_other_run(Path("where"), ours | {"settle": 0.1})


@pytest.mark.parametrize("content", [[1, 2], {"identity": {}}, {"identity": [1]}, None], ids=repr)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / CHECKPOINT
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"^resume: got .*; expected a whole checkpoint") as caught:
        Checkpoint.read(path, CPU)
    assert str(path) in str(caught.value)
