"""The settings: what they refuse, what they keep, and the rules of the default rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from l0fast import TrainerSettings
from l0fast.constraints.defaults import default_dual_lr
from l0fast.gating.param_groups import default_gate_lr


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0}, ValueError, "density: got 0; expected a density in (0, 1]"),
        ({"density": 1.5}, ValueError, "density: got 1.5; expected a density in (0, 1]"),
        ({"density": math.nan}, ValueError, "density: got nan; expected a density in (0, 1]"),
        ({"density": "abc"}, ValueError, "density: got 'abc'; expected a density in (0, 1]"),
        ({"density": True}, TypeError, "density: got True; expected a density in (0, 1]"),
        ({"layer_density": 0.5}, TypeError, "layer_density: got 0.5; expected layer names or"),
        ({"layer_density": {"fc1": 2}}, ValueError, "layer_density['fc1']: got 2; expected a den"),
        ({"density": 0.5, "penalty": 1}, ValueError, "penalty: got 1; expected only one of"),
        ({"density": 0.5, "layer_density": {}}, ValueError, "layer_density: got {}; expected only"),
        ({"density": 0.5, "measure": "flops"}, ValueError, "measure: got 'flops'; expected one of"),
        ({"measure": "macs"}, ValueError, "measure: got 'macs'; expected a density or layer_den"),
        ({"penalty": 1, "measure": "macs"}, ValueError, "measure: got 'macs'; expected a density"),
        ({"penalty": -1}, ValueError, "penalty: got -1; expected a number >= 0"),
        ({"epochs": 0}, ValueError, "epochs: got 0; expected a whole number >= 1"),
        ({"epochs": -1}, ValueError, "epochs: got -1; expected a whole number >= 1"),
        ({"epochs": 1.5}, ValueError, "epochs: got 1.5; expected a whole number >= 1"),
        ({"epochs": True}, TypeError, "epochs: got True; expected a whole number >= 1"),
        ({"epochs": None}, TypeError, "epochs: got None; expected a whole number >= 1"),
        ({"batch_size": 0}, ValueError, "batch_size: got 0; expected a whole number >= 1"),
        ({"seed": -1}, ValueError, "seed: got -1; expected a whole number >= 0"),
        ({"seed": 2**32}, ValueError, f"seed: got {2**32}; expected a whole number >= 0"),
        ({"seed": 10**400}, ValueError, "seed: got 1000000"),
        ({"lr": 0}, ValueError, "lr: got 0; expected a number > 0"),
        ({"gate_lr": -1}, ValueError, "gate_lr: got -1; expected a number > 0"),
        ({"dual_lr": math.inf}, ValueError, "dual_lr: got inf; expected a number >= 0"),
        ({"weight_decay": None}, TypeError, "weight_decay: got None; expected a number >= 0"),
        (
            {"dual": "sgd"},
            ValueError,
            "dual: got 'sgd'; expected one of 'ascent', 'pi',",
        ),
        ({"target_schedule": "step"}, ValueError, "target_schedule: got 'step'; expected one of"),
        ({"target_warmup": 0.0}, ValueError, "target_warmup: got 0.0; expected a share of the"),
        ({"target_warmup": 1.1}, ValueError, "target_warmup: got 1.1; expected a share of the"),
        ({"schedule": "step"}, ValueError, "schedule: got 'step'; expected one of 'cosine', 'con"),
    ],
)
def test_bad_settings(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        TrainerSettings(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_numbers_are_kept_as_pythons_own() -> None:
    """A checkpoint holds them, and loads no others."""
    density: Any = np.linspace(0.1, 0.5, 5)[-1]
    penalty: Any = np.float64(0.5)
    assert type(density) is not float
    assert type(TrainerSettings(density=density).density) is float
    assert type(TrainerSettings(penalty=penalty).penalty) is float
    targets = TrainerSettings(layer_density={"b": density, "a": density}).layer_density
    assert targets is not None
    assert list(targets) == ["a", "b"]
    assert all(type(value) is float for value in targets.values())


@pytest.mark.parametrize(
    ("options", "gated"),
    [({}, False), ({"density": 0.5}, True), ({"layer_density": {}}, True), ({"penalty": 0}, True)],
)
def test_gated(options: dict[str, Any], gated: bool) -> None:
    assert TrainerSettings(**options).gated is gated


def test_the_dual_learning_rate() -> None:
    """33 / (target x steps), at most 0.1."""
    assert default_dual_lr(0.33, 10_000) == pytest.approx(0.01)
    assert default_dual_lr(0.1, 86_000) == pytest.approx(33 / 8600)
    assert default_dual_lr(0.33, 100) == 0.1
    assert default_dual_lr(0.001, 1) == 0.1
    # Where the target comes down, 1 / target.
    assert default_dual_lr(0.25) == 4.0


def test_the_gates_learning_rate() -> None:
    """30 / steps, between 0.03 and 0.1."""
    assert default_gate_lr(500) == pytest.approx(0.06)
    assert default_gate_lr(86_000) == 0.03
    assert default_gate_lr(10) == 0.3
