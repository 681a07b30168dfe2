"""A warning shows the line of the caller's code that led to it, whatever lies in between."""

from __future__ import annotations

import ast
import errno
import linecache
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from l0fast import (
    Constraints,
    DensityConstraint,
    Trainer,
    TrainerSettings,
    gates,
    prune,
    sparsify_,
)
from l0fast.data.formats import Split
from l0fast.data.sets import Data
from l0fast.training import tensorboard
from tests import ROOT
from tests.helpers import plain_models as plain
from tests.helpers.gated import gated_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(8, 12)


def gated() -> nn.Module:
    torch.manual_seed(0)
    return gated_mlp(12, 20, 3, mean=2.0)


def few_steps() -> None:
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    constraint = DensityConstraint(model, 0.5, steps=20)
    constraint.attach(optimizer)  # shown


def frozen_gates() -> None:
    """The optimizer's step is wrapped by a schedule, and calls a hook of the library."""
    model = gated()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    DensityConstraint(model, 0.5, steps=300, start=0).attach(optimizer)
    for gate in gates(model).parameters():
        gate.requires_grad_(False)
    model(X).sum().backward()
    optimizer.step()  # shown
    schedule.step()


def loop_without_gates() -> None:
    model = gated()
    constraint = DensityConstraint(model, 0.25, steps=300, start=0)
    own = [p for name, p in model.named_parameters() if "log_alpha" not in name]
    optimizer = torch.optim.SGD(own, 1e-3)
    for _ in range(10):
        (model(X).square().mean() + constraint()).backward()
        optimizer.step()
        constraint.step()  # shown


def early_settling() -> None:
    DensityConstraint(gated(), 0.3).settle()  # shown


def early_settling_of_several() -> None:
    Constraints([DensityConstraint(gated(), 0.3)]).settle()  # shown


def model_that_does_not_export() -> None:
    sparsify_(plain.DataDependent(), example_inputs=torch.rand(4, 6))  # shown


def open_gates() -> None:
    model = gated()
    prune(model, X, target=0.3)  # shown


DOORS: list[Callable[[], None]] = [
    few_steps,
    frozen_gates,
    loop_without_gates,
    early_settling,
    early_settling_of_several,
    model_that_does_not_export,
    open_gates,
]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("default:prune. closes")
def test_the_line_of_the_caller_is_shown(door: Callable[[], None]) -> None:
    with pytest.warns(UserWarning, match=": ") as seen:
        door()
    (warning,) = seen
    assert warning.filename == __file__
    assert "# shown" in linecache.getline(warning.filename, warning.lineno)


def test_the_line_that_calls_the_trainer_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left", str(folder))

    pytest.importorskip("tensorboard")
    monkeypatch.setattr(tensorboard, "_Events", full)
    split = Split(X, torch.arange(8) % 3)
    settings = TrainerSettings(density=0.5, epochs=1, batch_size=4)
    trainer = Trainer(gated(), Data(split, None, split), settings, out=tmp_path, device="cpu")
    with pytest.warns(UserWarning, match="cannot be written") as seen:
        trainer.fit()  # shown
    assert {warning.filename for warning in seen} == {__file__}
    warning = seen[0]
    assert "# shown" in linecache.getline(warning.filename, warning.lineno)


def test_all_warnings_go_one_way() -> None:
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "l0fast").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
    ]
    assert [call.partition(":")[0] for call in calls] == ["l0fast/_warnings.py"]
