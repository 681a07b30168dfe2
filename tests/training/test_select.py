"""Which epoch's model is pruned, and whether an epoch's model is within its targets as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l0fast import Trainer, density, prune
from l0fast.constraints.constraint import DensityConstraint
from l0fast.data.sets import Data
from l0fast.training import trainer as trainer_module
from tests.helpers.runs import evaluate, quick, small_mlp, trainer
from tests.helpers.thinned import thinned

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("measure", thinned(["params", "gates", "macs"], 3))
def test_an_epoch_is_feasible_where_pruning_forces_nothing(digits: Data, measure: str) -> None:
    """By each measure, over a training that passes through its target."""
    one = trainer(digits, density=0.5, measure=measure, epochs=8, gate_lr=0.08)
    seen: list[bool] = []

    def check(row: dict[str, Any]) -> None:
        small: Any = prune(one.model, one.example_inputs)
        seen.append(row["feasible"])
        assert row["feasible"] is (small.report.forced == 0)

    one.fit(on_epoch=check)
    assert set(seen) == {True, False}


def test_realised_is_what_the_gates_say(digits: Data) -> None:
    one = trainer(digits, layer_density={"fc1": 0.5, "fc2": 0.8, "fc3": 0.9}, start=0)
    assert isinstance(one.term, DensityConstraint)
    layers = dict(one.model.named_modules())
    with torch.no_grad():
        for name, closed in (("fc1", 32), ("fc2", 4), ("fc3", 16)):
            layers[name].log_alpha[:closed] = -5.0  # type: ignore[index]
    assert one.term.realised() == {"fc1": 0.5, "fc2": 1 - 4 / 32, "fc3": 0.0}
    assert one.term.targets == {"fc1": 0.5, "fc2": 0.8, "fc3": 0.9}
    assert [row.realised for row in density(one.model).layers] == [0.5, 1 - 4 / 32, 0.0]


def spoil(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[bool, float]]) -> None:
    """Lets the epochs have these (feasible, validation error)."""
    measure, left = trainer_module.measure, iter(rows)

    def spoiled(*args: Any) -> dict[str, Any]:
        feasible, error = next(left)
        changed = {"feasible": feasible, "validation_error_percent": error}
        found = measure(*args)
        return found | {key: value for key, value in changed.items() if key in found}

    monkeypatch.setattr(trainer_module, "measure", spoiled)


@pytest.mark.parametrize(
    ("rows", "selected"),
    thinned(
        [
            ([(False, 1.0), (True, 5.0), (True, 7.0)], 2),
            ([(True, 9.0), (True, 5.0), (True, 7.0)], 2),
            ([(True, 5.0), (True, 5.0), (False, 5.0)], 2),  # the later of equals
            ([(True, 9.0), (False, 5.0), (False, 7.0)], 1),
            ([(False, 1.0), (False, 5.0), (False, 7.0)], 3),  # none: the last, held by pruning
        ],
        2,
    ),
)
def test_the_best_feasible_epoch_is_pruned(
    digits: Data,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[tuple[bool, float]],
    selected: int,
) -> None:
    one = trainer(digits, density=0.6, epochs=3, select="best", settle=0)
    spoil(monkeypatch, rows)
    wanted: list[Any] = []
    one_example = one.example_inputs
    summary = one.fit(on_epoch=lambda _: wanted.append(prune(one.model, one_example)))
    assert summary["selected_epoch"] == selected
    assert summary["validation_error_percent"] == rows[selected - 1][1]
    assert summary["expected_density"] == one.history[selected - 1]["expected_density"]
    assert summary["feasible"] is True
    small: Any = one.pruned
    for name, value in wanted[selected - 1].state_dict().items():
        assert torch.equal(small.state_dict()[name], value)
    assert summary["test_error_percent"] == evaluate(small, digits.test)
    # The model itself is the last epoch's.
    last = prune(one.model, one_example).state_dict()
    assert all(torch.equal(value, last[name]) for name, value in wanted[-1].state_dict().items())


def test_the_best_is_of_those_whose_gates_have_settled(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(digits, density=0.6, epochs=4, select="best", settle=0.5)
    spoil(monkeypatch, [(True, 1.0), (True, 2.0), (True, 5.0), (True, 7.0)])
    assert one.fit()["selected_epoch"] == 3


def test_a_dense_training_selects_too(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(digits, epochs=3, select="best")
    spoil(monkeypatch, [(True, 9.0), (True, 5.0), (True, 7.0)])
    summary = one.fit()
    assert summary["selected_epoch"] == 2
    assert summary["test_error_percent"] == one.history[1]["test_error_percent"]


def test_without_a_validation_split_there_is_no_best(digits: Data) -> None:
    unsplit = Data(digits.train, None, digits.test, 10)
    with pytest.raises(ValueError, match=r"^select: got 'best'; expected 'last', as there is"):
        Trainer(small_mlp(), unsplit, quick(density=0.5, select="best"), device="cpu")
