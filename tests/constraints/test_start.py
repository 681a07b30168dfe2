"""The start of a training: all gates open without noise, then each by its unit's magnitude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from l0fast import (
    Constraints,
    DensityConstraint,
    L0Penalty,
    Trainer,
    TrainerSettings,
    gates,
    prune,
)
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.constraints.ranking import shared_magnitudes
from l0fast.data.sets import Data, Split
from l0fast.gating.param_groups import param_groups
from l0fast.layers.stages import DRAWN, OPEN, QUIET, SETTLED
from tests.helpers.gated import gated_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 40
X, Y = torch.randn(32, 12), torch.randint(3, (32,))


class Loop:
    """The Lagrangian written out."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = gated_mlp(12, 20, 3, mean=2.0)
        chosen: dict[str, Any] = {"start": 0.25, **options}
        self.constraint = DensityConstraint(self.model, 0.4, steps=STEPS, **chosen)
        self.optimizer = torch.optim.AdamW(param_groups(self.model, 1e-2, steps=STEPS))

    def train(self, steps: int) -> None:
        for _ in range(steps):
            (F.cross_entropy(self.model(X), Y) + self.constraint()).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.constraint.step()

    @property
    def stage(self) -> str:
        return gates(self.model).stage


def log_alphas(model: nn.Module) -> list[torch.Tensor]:
    return [one.detach().clone() for one in gates(model).parameters()]


def assert_by_magnitude(model: nn.Module) -> None:
    found: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    for name, sizes in shared_magnitudes(gates(model).layers).items():
        log_alpha = gates(model).layers[name].log_alpha.detach()
        assert torch.equal(log_alpha.argsort(), sizes.argsort())
        found.append(log_alpha)
        squares = sizes.double().square()
        left = torch.stack([squares[squares >= one].sum() for one in squares])
        wanted.append(squares / left)
    # Over all layers: by the share that each unit has of what is left of its layer.
    assert torch.equal(torch.cat(found).argsort(), torch.cat(wanted).argsort(stable=True))
    assert (float(torch.cat(found).min()), float(torch.cat(found).max())) == (-2.0, 6.0)


def test_an_explicit_loop_has_it() -> None:
    loop = Loop()
    before = log_alphas(loop.model)
    loop.train(9)
    assert loop.stage == OPEN
    assert float(loop.constraint()) == 0
    assert all(map(torch.equal, before, log_alphas(loop.model)))
    loop.train(1)  # the last of a quarter
    assert loop.stage == QUIET
    assert_by_magnitude(loop.model)
    assert float(loop.constraint.multiplier) == float(loop.constraint.taken) == 0
    density = loop.constraint.densities().detach()
    torch.testing.assert_close(loop.constraint.current_target, density)
    loop.train(5)
    assert float(loop.constraint.taken) == 5
    assert float(loop.constraint.multiplier) > 0


@pytest.mark.parametrize(
    "options", [{"steps": None}, {"start": 0.0}], ids=["without steps", "start=0"]
)
def test_there_may_be_none(options: dict[str, Any]) -> None:
    model = gated_mlp(12, 20, 3, mean=2.0)
    chosen: dict[str, Any] = {"steps": STEPS, **options}
    constraint = DensityConstraint(model, 0.4, **chosen)
    assert gates(model).stage == DRAWN
    assert not constraint.starting


@pytest.mark.parametrize("stop", [4, 10, 15])
def test_a_resumed_loop_goes_on_bit_equal(stop: int) -> None:
    whole = Loop()
    whole.train(stop)
    states = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in one.state_dict().items()}
        for one in (whole.model, whole.constraint)
    ]
    moments, rng = _copied(whole.optimizer.state_dict()), torch.get_rng_state()
    whole.train(20)
    other = Loop()
    other.model.load_state_dict(states[0])
    other.constraint.load_state_dict(states[1])
    other.optimizer.load_state_dict(moments)
    torch.set_rng_state(rng)
    other.train(20)
    for one, two in zip(
        whole.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)
    assert torch.equal(whole.constraint.multiplier, other.constraint.multiplier)


def _copied(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return [_copied(one) for one in state] if isinstance(state, list) else state


def test_several_constraints_start_as_one() -> None:
    model = gated_mlp(12, 20, 3, mean=2.0)
    first = DensityConstraint(model, 0.4, steps=STEPS, start=0.25)
    other = DensityConstraint(model, {"0": 0.9})  # ends the start, on its own
    assert gates(model).stage == DRAWN
    both = Constraints([first, other])
    assert gates(model).stage == OPEN
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2, steps=STEPS))
    for _ in range(10):
        assert both.starting
        assert float(both()) == 0
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        both.step()
    assert not both.starting
    assert_by_magnitude(model)
    assert gates(model).stage == QUIET


def test_settling_ends_it() -> None:
    loop = Loop()
    loop.train(5)
    with pytest.warns(UserWarning, match="settle: "):
        loop.constraint.settle(loop.optimizer)
    assert loop.stage == SETTLED
    assert loop.constraint.realised()["model"] <= 0.4
    for name, sizes in shared_magnitudes(gates(loop.model).layers).items():
        kept = gates(loop.model).layers[name].evaluation_gates() > 0
        assert float(sizes[kept].min()) > float(sizes[~kept].max())
    loop.train(3)
    assert loop.stage == SETTLED


def test_magnitude_pruning_has_none() -> None:
    model = gated_mlp(12, 20, 3, mean=2.0)
    term = MagnitudePruning(model, 0.4, steps=STEPS)
    term.open_(10)
    assert gates(model).stage == DRAWN
    assert not term.starting


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"got step\(\) in a CUDA graph .* or start=0"):
        loop.constraint.step()


@pytest.mark.parametrize("start", [-0.1, 1.0, "0.2"])
def test_a_share_out_of_its_range_is_refused(start: Any) -> None:
    model = gated_mlp(12, 20, 3, mean=2.0)
    with pytest.raises((ValueError, TypeError), match="start: got"):
        DensityConstraint(model, 0.4, steps=STEPS, start=start)
    with pytest.raises((ValueError, TypeError), match="start: got"):
        TrainerSettings(density=0.4, start=start)


# --- the trainer ---------------------------------------------------------------------------------


def data() -> Data:
    return Data(Split(X, Y), None, Split(X, Y), 3)


def trainer(out: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"density": 0.4, "epochs": 8, "batch_size": 8, "start": 0.25}
    model = gated_mlp(12, 20, 3, mean=2.0)
    return Trainer(model, data(), TrainerSettings(**chosen | options), out=out, device="cpu")


@pytest.mark.parametrize("options", [{}, {"density": None, "penalty": 1.0}], ids=str)
def test_a_trainer_has_it(options: dict[str, Any]) -> None:
    one = trainer(**options)
    stages: list[str] = []
    one.fit(on_epoch=lambda _row: stages.append(gates(one.model).stage))
    assert stages == [OPEN, *[QUIET] * 5, SETTLED, SETTLED]
    assert one.history[0]["expected_density"] == 1
    assert one.history[1]["expected_density"] < 1


def test_targets_have_come_down_when_the_gates_settle() -> None:
    one = trainer(settle=0.5)
    one.fit()
    assert one.history[3]["aim"]["model"] == pytest.approx(0.4)
    assert isinstance(one.term, DensityConstraint)
    assert one.term.schedule is not None
    assert one.term.schedule.steps == 8  # between a quarter and a half of 32


@pytest.mark.parametrize("stop", [1, 2])
def test_an_interrupted_trainer_goes_on_bit_equal(tmp_path: Path, stop: int) -> None:
    whole = trainer(start=0.3)  # ends within the third epoch
    whole.fit()

    class Stop(Exception):
        pass

    def interrupt(row: dict[str, Any]) -> None:
        if row["epoch"] == stop:
            raise Stop("stopped")

    with pytest.raises(Stop, match="stopped"):
        trainer(tmp_path, start=0.3).fit(on_epoch=interrupt)
    torch.manual_seed(5)
    other = trainer(tmp_path, start=0.3)
    other.fit(resume=True)
    for one, two in zip(
        whole.model.state_dict().values(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two)


def test_a_run_that_starts_from_another_has_none() -> None:
    first = trainer()
    first.fit()
    second = trainer()
    assert second.term is not None
    assert second.term.starting
    second.open(start_from=first.next_start())
    assert not second.term.starting


def test_a_penalty_is_nothing_in_it() -> None:
    model = gated_mlp(12, 20, 3, mean=2.0)
    penalty = L0Penalty(model, 1.0)
    penalty.open_(2)
    with torch.no_grad():
        assert float(penalty()) == 0
    penalty.step()
    penalty.step()
    with torch.no_grad():
        assert float(penalty()) > 0


@pytest.mark.parametrize("measure", ["gates", "params"])
def test_a_model_is_pruned_in_it(measure: str) -> None:
    model = gated_mlp(12, 20, 3, mean=2.0)
    constraint = DensityConstraint(model, 0.4, measure=measure, example_inputs=X, steps=STEPS)
    assert constraint.starting
    with pytest.warns(UserWarning, match="prune: closes"):
        small: Any = prune(model, X)
    assert small.report.density <= 0.4 or measure == "params"
    assert small.report.forced > 0
    whole: Any = prune(model, X, target=1.0)
    torch.testing.assert_close(whole(X), model.eval()(X))


def test_quiet_gates_have_a_tenth_of_the_noise() -> None:
    model = gated_mlp(12, 200, 3, mean=0.0)
    layer = gates(model).layers["2"]
    drawn: list[torch.Tensor] = []
    for stage in (DRAWN, QUIET):
        gates(model).set_stage(stage)
        torch.manual_seed(0)
        drawn.append(layer._drawn().detach())
    inside = torch.stack([(z > 0) & (z < 1) for z in drawn]).all(0)
    loud, quiet = (
        torch.logit((z[inside] + 0.1) / 1.2) * 2 / 3 - layer.log_alpha.detach()[inside]
        for z in drawn
    )
    assert int(inside.sum()) > 20
    torch.testing.assert_close(quiet, 0.1 * loud, rtol=0, atol=1e-4)
    wanted = layer.distribution.open_probability(layer.log_alpha)
    assert torch.equal(layer.open_probability(), wanted)
