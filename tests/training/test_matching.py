"""A checkpoint that does not fit its run is refused before anything is taken from it."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import load_pruned, sparsify_
from l0fast.commands.runs import read_summary
from l0fast.data.sets import Data
from l0fast.graph.calls import Example
from l0fast.pruning.shrink import plan_removal
from l0fast.training.checkpoint import CHECKPOINT, Checkpoint
from l0fast.training.entries import Entries
from l0fast.training.folder import PRUNED, SUMMARY
from l0fast.training.removals import check_removals
from l0fast.training.settings import BEFORE
from tests.helpers.fuzz import replaced, unnoticed, write_checkpoint, wrong_entries
from tests.helpers.runs import small_mlp, trainer
from tests.helpers.same_run import assert_same
from tests.helpers.thinned import telling

CPU = torch.device("cpu")
TRIES = int(os.environ.get("L0FAST_FUZZ", "60"))
"""How many wrong entries are tried for each case, and changed bytes for each file."""


def may_be(at: tuple[Any, ...], what: str) -> bool:
    """Whether a run may have written this: what an earlier version did without saying so, or a
    parameter that has no moments, since nothing reads it."""
    unsaid = at == ("identity",) and what in [f"without {name!r}" for name in BEFORE]
    unread = at == ("optimizer", "state") and what.startswith("without ")
    left_out = at in [("threads",), ("host_rng",)] and what == "None"
    drawn_ahead = at[:1] == ("host_rng",) and at[-1:] == ("gauss",) and what == "a number"
    return unsaid or unread or left_out or drawn_ahead


CASES: dict[str, dict[str, Any]] = {
    "constrained": {"density": 0.5, "epochs": 2},
    "best": {"density": 0.5, "epochs": 3, "select": "best"},
    "shrinking": {"penalty": 0.5, "epochs": 3, "shrink": 1, "gate_lr": 1.0},
    "magnitude": {"density": 0.5, "epochs": 2, "method": "magnitude"},
    "dense": {"epochs": 1},
}
"""Settings of runs whose checkpoints have different entries."""


@pytest.fixture(scope="module", params=telling(CASES, ["constrained", "shrinking"]))
def saved(
    request: pytest.FixtureRequest, digits: Data, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """(settings, folder, what its checkpoint holds) of a finished run."""
    settings = {**CASES[request.param], "batch_size": 512}
    out = tmp_path_factory.mktemp("saved") / "run"
    trainer(digits, out, **settings).fit()
    return settings, out, torch.load(out / CHECKPOINT, weights_only=True)


def test_every_wrong_entry_is_refused(saved: Any, digits: Data, tmp_path: Path) -> None:
    settings, _, state = saved
    run = trainer(digits, tmp_path / "run", **settings)._as_asked
    path = tmp_path / CHECKPOINT
    write_checkpoint(path, state)
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    run.check(Checkpoint.read(path, CPU), path)  # the whole one fits
    every = [one for one in wrong_entries(state) if not may_be(one[0], one[1])]
    assert len(every) > 300
    taken: list[str] = []
    for at, what, value in random.Random(0).sample(every, TRIES):
        write_checkpoint(path, replaced(state, at, value))
        try:
            read = Checkpoint.read(path, CPU)
            read.refuse_other_run(path, state["identity"])
            run.check(read, path)
        except ValueError:
            continue
        taken.append(f"{'.'.join(map(str, at))}: {what}")
    assert not taken, f"{len(taken)} of {TRIES}: {taken}"
    assert_same(dict(run.state.model.state_dict()), before)


@pytest.mark.parametrize("saved", ["constrained"], indirect=True)
def test_numbers_of_another_run_are_refused(saved: Any, digits: Data, tmp_path: Path) -> None:
    """What has the right class and shape, and is still not what this run can have written."""
    settings, _, state = saved
    run = trainer(digits, tmp_path / "run", **settings)._as_asked
    path = tmp_path / CHECKPOINT
    changes: dict[tuple[Any, ...], Any] = {
        ("epoch",): 1,
        ("step",): state["step"] + 1,
        ("format",): 3,
        ("history", 0, "epoch"): 2,
        ("history", 1, "test_error_percent"): 101.0,
        ("term", "multiplier"): torch.tensor([-1.0]),
        ("term", "target"): torch.tensor([0.6]),
        ("term", "dual_lr"): torch.tensor(7.0),
        ("term", "_extra_state", "targets"): [0.6],
        ("term", "_extra_state", "settled"): False,
        ("model", "fc1._extra_state"): torch.tensor(0),
        ("model", "fc2._extra_state"): torch.tensor(9),
        ("model", "fc1.weight"): state["model"]["fc1.weight"].to(torch.int32),
        ("model", "fc1.bias"): torch.full_like(state["model"]["fc1.bias"], math.inf),
        ("optimizer", "param_groups", 0, "lr"): 1.0,
        ("optimizer", "param_groups", 0, "betas"): (0.5, 0.5),
        ("optimizer", "param_groups", 0, "params"): [0, 0, 0, 0, 0, 0],
        ("optimizer", "param_groups", 0, "fused"): None,
        ("optimizer", "state", 0, "exp_avg"): torch.zeros(3),
        ("optimizer", "state", 0, "exp_avg_sq"): -state["optimizer"]["state"][0]["exp_avg_sq"] - 1,
        ("optimizer", "state", 0, "step"): torch.tensor(0.5),
        ("rng",): torch.zeros(9, dtype=torch.uint8),
        ("host_rng",): {"python": state["host_rng"]["python"]},
        ("host_rng", "python", "words"): torch.zeros(9, dtype=torch.int64),
        ("host_rng", "python", "position"): 625,
        ("host_rng", "numpy", "words"): torch.full((624,), 2**32),
        ("host_rng", "numpy", "gauss"): math.nan,
        ("best",): {"epoch": 2, "model": state["model"]},
        ("removals",): [],
    }
    for at, value in changes.items():
        changed = {**state, at[0]: value} if len(at) == 1 else replaced(state, at, value)
        write_checkpoint(path, changed)
        with pytest.raises(ValueError, match=r"^resume: got .*; expected a whole checkpoint"):
            run.check(Checkpoint.read(path, CPU), path)


@pytest.mark.parametrize("saved", ["constrained"], indirect=True)
def test_the_trainer_asks_before_it_takes(saved: Any, digits: Data, tmp_path: Path) -> None:
    """The optimizer's state of other shapes was a crash of the process."""
    settings, _, state = saved
    out = tmp_path / "run"
    out.mkdir()
    wrong = replaced(state, ("optimizer", "state", 0, "exp_avg"), torch.zeros(1))
    write_checkpoint(out / CHECKPOINT, wrong)
    one = trainer(digits, out, **settings)
    with pytest.raises(ValueError, match=r"its optimizer\.state\.0\.exp_avg has shape \(1,\), not"):
        one.fit(resume=True)
    assert not one.optimizer.state
    # The lock is given back: another run can go on here.
    write_checkpoint(out / CHECKPOINT, state)
    assert trainer(digits, out, **settings).fit(resume=True)["epochs"] == 2


@pytest.mark.parametrize("saved", ["constrained"], indirect=True)
def test_other_threads_are_told(saved: Any, digits: Data, tmp_path: Path) -> None:
    settings, _, state = saved
    out = tmp_path / "run"
    out.mkdir()
    write_checkpoint(out / CHECKPOINT, state | {"threads": state["threads"] + 1})
    with pytest.warns(UserWarning, match=r"threads: got \d+; the run began with \d+: its results"):
        trainer(digits, out, **settings).open(resume=True)


@pytest.mark.parametrize("saved", ["constrained"], indirect=True)
def test_changed_bytes_are_noticed(saved: Any, tmp_path: Path) -> None:
    """Of each file that is read again: refused, or read as what it was."""
    _, out, state = saved
    small = load_pruned(small_mlp, out / PRUNED)
    summary = read_summary(out / SUMMARY)

    def same_checkpoint(got: Checkpoint) -> bool:
        torch.testing.assert_close(vars(got)["model"], state["model"], rtol=0, atol=0)
        return all(getattr(got, key) == state[key] for key in ("epoch", "history", "identity"))

    def same_pruned(got: Any) -> bool:
        ours, theirs = small.state_dict(), got.state_dict()
        return all(torch.equal(ours[n], theirs[n]) for n in ours) and got.report == small.report

    def read_done(path: Path) -> Any:
        found = read_summary(path)
        if not found:
            raise ValueError("not done")
        return found

    tries = TRIES
    cases: list[tuple[str, Any, Any]] = [
        (CHECKPOINT, lambda path: Checkpoint.read(path, CPU), same_checkpoint),
        (PRUNED, lambda path: load_pruned(small_mlp, path), same_pruned),
        (SUMMARY, read_done, lambda got: got.items() >= summary.items()),
    ]
    for name, read, same in cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = unnoticed((out / name).read_bytes(), tmp_path / name, tries, read, same)
        assert found == [], f"{name}: {len(found)} of {tries}"


class Scaled(nn.Module):
    """A learned scale, which gets smaller with the units, and sizes that follow them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.scale = nn.Linear(6, 8), nn.Parameter(torch.rand(8) + 0.5)
        self.b, self.sizes = nn.Linear(4, 3), (4, 4)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.a(x).relu() * self.scale).split(self.sizes, 1)
        return self.b(one * other)


def test_removed_scales_and_sizes_are_taken_again() -> None:
    """A removal names tensors and attributes of several sizes, too, as `prune` does."""
    x = torch.randn(4, 6)
    torch.manual_seed(0)
    model = sparsify_(Scaled(), exclude="a", example_inputs=x)
    earlier, example = copy.deepcopy(model), Example.of(x, model)
    kept = {"b": torch.tensor([True, False, True, True])}
    removal, _ = plan_removal(model, example, kept)
    assert removal is not None
    assert "scale" in [edit.name for edit in removal.edits]
    assert [patch.value for patch in removal.patches] == [((3, 3), (4, 4))]
    entries = Entries(Path("checkpoint.pt"))
    check_removals(entries, [json.loads(json.dumps(removal.as_json()))], earlier, example)
    assert (earlier.a.out_features, earlier.scale.numel(), earlier.sizes) == (6, 6, (3, 3))
    with pytest.raises(ValueError, match=r"is of another model \(its 'root' is a Scaled with"):
        check_removals(entries, [removal.as_json()], earlier, example)
