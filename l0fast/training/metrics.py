"""The metrics of a model, measured between two epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l0fast import _checks, _warnings
from l0fast._metrics import held_key, validation_key
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.constraints.stall import find_stalls
from l0fast.layers.handle import gates
from l0fast.measures.density import density
from l0fast.training.batches import Batches
from l0fast.training.method import Term
from l0fast.training.precision import Precision
from l0fast.training.task import Task

Row = dict[str, Any]
"""The metrics of one epoch: a line of metrics.jsonl."""


def check_finite(model: nn.Module, loss: float, epoch: int) -> None:
    """Raises an error if an epoch has left NaN or infinity.

    Raises:
        ValueError: the mean loss of the epoch, or a weight after it, is NaN or infinite.
    """
    # The loss does not show the weights after the last step of the epoch.
    weights_finite = all(bool(tensor.isfinite().all()) for tensor in model.parameters())
    if math.isfinite(loss) and weights_finite:
        return
    name, got = ("weights", "NaN or infinity") if math.isfinite(loss) else ("loss", loss)
    expected = "finite numbers; try a smaller lr (the epochs before are kept)"
    _checks.refuse(f"{name} (epoch {epoch})", got, expected)


@dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated after an epoch."""

    task: Task
    validation: Batches | None
    test: Batches
    precision: Precision

    def _mean(self, key: str, model: nn.Module, batches: Iterable[Any]) -> Row:
        """The metric of all examples, by its key."""
        with self.precision.forward():
            found = self.task.mean(model, batches)
        if not math.isfinite(found):
            expected = "the model, or the metric, gives NaN or infinity for some of the examples"
            _warnings.warn(f"{key} is {found}: {expected}")
        return {key: found}

    def validated(self, model: nn.Module, epoch: int) -> Row:
        """Key -> the metric of the validation examples; empty without such examples."""
        if self.validation is None:
            return {}
        return self._mean(validation_key(self.task.metric), model, self.validation.whole(epoch))

    def tested(self, model: nn.Module, epoch: int) -> Row:
        """Key -> the metric of the test examples."""
        return self._mean(held_key(self.task.metric), model, self.test.whole(epoch))


def measure(model: nn.Module, evaluation: Evaluation, epoch: int, term: Term | None) -> Row:
    """The present metrics of a model: its errors, its gates, and the state of its constraints."""
    row = {**evaluation.validated(model, epoch), **evaluation.tested(model, epoch)}
    if term is not None:
        row |= _gate_metrics(model)
    if isinstance(term, DensityConstraint):
        row |= _constraint_metrics(term)
    return row


def stall_metrics(term: Term | None, history: Sequence[Row], epochs: int, gate_lr: float) -> Row:
    """{"stalls": name of each constraint that stalls -> message}; empty without multipliers.

    Args:
        term: of the loss.
        history: all rows so far, with the row to which this is added.
        epochs: of the whole training.
        gate_lr: the learning rate of the gates, for the message.
    """
    if not isinstance(term, DensityConstraint) or isinstance(term, MagnitudePruning):
        return {}
    targets = dict(zip(term.names, term.target.tolist(), strict=True))
    stalls = find_stalls(history, targets, epochs)
    dual_lr = float(term.dual_lr)
    return {"stalls": {name: stall.message(dual_lr, gate_lr) for name, stall in stalls.items()}}


def _gate_metrics(model: nn.Module) -> Row:
    """The density of the model and of each layer, and the layers without an open gate."""
    table = density(model)
    return {
        "expected_density": table.total.expected,
        "realised_density": table.total.realised,
        "layers": {
            layer.name: {
                "kept": layer.open_gates,
                "of": layer.num_gates,
                "expected_density": layer.expected,
            }
            for layer in table.layers
        },
        "settled": gates(model).settled,
        "collapsed": [layer.name for layer in table.layers if not layer.open_gates],
    }


def _constraint_metrics(term: DensityConstraint) -> Row:
    """The state of each constraint: density, current target ("aim"), multiplier, restarts.

    "feasible" says whether the evaluation gates meet all targets; then pruning closes no open gate.
    """
    with torch.no_grad():
        by_constraint = {"density": term.densities()}
        if not isinstance(term, MagnitudePruning):
            by_constraint |= {
                "aim": term.current_target,
                "lambda": term.multiplier,
                "restarts": term.restarts.long(),
            }
    row: Row = {
        key: dict(zip(term.names, values.tolist(), strict=True))
        for key, values in by_constraint.items()
    }
    realised, targets = term.realised(), term.targets
    feasible = all(realised[name] <= targets[name] for name in term.names)
    return row | {"measure": term.measure, "feasible": feasible}
