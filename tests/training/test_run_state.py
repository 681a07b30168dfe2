"""The state of a run: all of it is in a checkpoint. (Whole runs: test_resume.py.)"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from l0fast.training.checkpoint import Checkpoint
from l0fast.training.run_state import RunState

CPU = torch.device("cpu")


def made(**changes: Any) -> RunState:
    """The state of a dense run of a small model."""
    model = nn.Linear(3, 2)
    return RunState(CPU, model, torch.optim.Adam(model.parameters()), None, **changes)


def test_a_checkpoint_holds_all_of_it(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "epoch": 2,
        "step": 20,
        "seconds": 1.5,
        "history": [{"epoch": 1}, {"epoch": 2}],
        "best": {"epoch": 1, "model": {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}},
    }
    objects = {"device", "model", "optimizer", "term", "shrinking", "metric", "average", "scaler"}
    assert {field.name for field in fields(RunState)} == values.keys() | objects
    one, other = made(**values), made()
    one.model(torch.ones(4, 3)).sum().backward()
    one.optimizer.step()
    one.checkpoint({"lr": 0.1}).write(tmp_path / "checkpoint")
    noise = torch.rand(3)
    other.load_(Checkpoint.read(tmp_path / "checkpoint", CPU), tmp_path / "checkpoint")
    assert torch.equal(torch.rand(3), noise)
    for name in values.keys() - {"best"}:
        assert getattr(other, name) == values[name], name
    assert other.best is not None
    assert other.best["epoch"] == 1
    torch.testing.assert_close(other.best["model"], values["best"]["model"], rtol=0, atol=0)
    for mine, its in ((one.model, other.model), (one.optimizer, other.optimizer)):
        torch.testing.assert_close(its.state_dict(), mine.state_dict(), rtol=0, atol=0)


def test_another_run_starts_from_it_at_its_own_first_epoch() -> None:
    one, other = made(epoch=2, step=20, history=[{"epoch": 1}, {"epoch": 2}]), made()
    other.start_from_(one.checkpoint({}))
    torch.testing.assert_close(other.model.state_dict(), one.model.state_dict(), rtol=0, atol=0)
    assert (other.epoch, other.step, other.history) == (0, 0, [])


@pytest.mark.parametrize(
    ("rows", "epoch"),
    [
        ([(None, 9.0), (None, 5.0), (None, 7.0)], 2),
        ([(True, 5.0), (True, 5.0), (False, 1.0)], 2),
        ([(False, 9.0), (False, 5.0), (True, 7.0)], 3),
        ([(False, 9.0), (False, 5.0), (False, 7.0)], 3),
    ],
    ids=str,
)
def test_the_selected_model(rows: list[tuple[bool | None, float]], epoch: int) -> None:
    """The best epoch's, with the weights that it had; the last one's if no epoch met its target."""
    state = made()
    for number, (feasible, error) in enumerate(rows, 1):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.fill_(number)
        state.epoch = number
        row: dict[str, Any] = {"validation_error_percent": error}
        row |= {} if feasible is None else {"feasible": feasible}
        state.history.append(row)
        state.keep_if_best()
    found, model = state.selected()
    assert found == epoch
    assert all(bool((parameter == epoch).all()) for parameter in model.parameters())
    assert all(bool((parameter == len(rows)).all()) for parameter in state.model.parameters())
