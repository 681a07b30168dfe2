"""What is measured of a model between two epochs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.constraints.settle import is_settled
from l0fast.data.sets import Split
from l0fast.layers.handle import gated_layers
from l0fast.measures.density import density

EVALUATION_BATCH = 1000

Row = dict[str, Any]


def error_percent(model: nn.Module, split: Split) -> float:
    """The share of examples that the model gets wrong, in percent; it is put into evaluation."""
    model.eval()
    wrong = 0
    with torch.no_grad():
        for x, y in zip(
            split.inputs.split(EVALUATION_BATCH),
            split.targets.split(EVALUATION_BATCH),
            strict=True,
        ):
            wrong += int((model(x).argmax(1) != y).sum())
    return 100 * wrong / len(split.targets)


def check_finite(model: nn.Module, loss: float, epoch: int) -> None:
    """Refuses to go on with what is no number any more.

    Raises:
        ValueError: the mean loss of the epoch, or a weight after it, is NaN or infinite.
    """
    # The loss does not tell what the last step of the epoch has done.
    whole = all(bool(tensor.isfinite().all()) for tensor in model.parameters())
    if not (math.isfinite(loss) and whole):
        name, got = ("weights", "NaN or infinity") if math.isfinite(loss) else ("loss", loss)
        expected = "finite numbers; try a smaller lr (the epochs before are kept)"
        _checks.refuse(f"{name} (epoch {epoch})", got, expected)


def gate_metrics(model: nn.Module) -> Row:
    """How dense the model is, in all and by layer, and which layers nothing passes through."""
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
        "settled": is_settled(gated_layers(model).values()),
        "collapsed": [layer.name for layer in table.layers if not layer.open_gates],
    }


def constraint_metrics(term: DensityConstraint) -> Row:
    """Where each constraint stands: its density, the target in force, its multiplier, its restarts
    so far; and whether all hold for the gates as they are in evaluation, so that pruning would
    close none of them."""
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
