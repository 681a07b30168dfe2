"""What a training came to, as summary.json has it."""

from __future__ import annotations

from typing import Any

from torch import nn

from l0fast.measures.flops import count_macs, count_params
from l0fast.pruning.report import Report
from l0fast.training.settings import TrainerSettings

Row = dict[str, Any]


def asked(settings: TrainerSettings) -> Row:
    """What the run was asked for."""
    return {
        "seed": settings.seed,
        "epochs": settings.epochs,
        "target_density": settings.density,
        "target_layer_density": settings.layer_density,
        "measure": settings.measure,
        "method": settings.method,
        "penalty": settings.penalty,
    }


def of_pruned(
    report: Report,
    settings: TrainerSettings,
    last: Row,
    test_error: float,
    before: Row,
) -> Row:
    """The outcome of a model that was pruned: `report` is its report, `last` the last metrics, and
    `before` those of the last epoch before its gates settled (or the last)."""
    groups = report.groups.values()
    feasible = all(group["density"] <= group["target"] for group in groups)
    return {
        "expected_density": last["expected_density"],
        "realised_density": report.density,
        "forced": report.forced,
        "collapsed": report.collapsed,
        "reopened": [name for name in before["collapsed"] if name not in report.collapsed],
        "architecture": report.architecture,
        "test_error_percent": test_error,
        "feasible": feasible if settings.penalty is None else None,
        **_sizes(report.params, report.macs),
        **_of_measure(report),
    }


def _of_measure(report: Report) -> Row:
    """Memory; and latency, if it was measured: by the table for one target, else as measured."""
    after, before = report.memory
    row: Row = {"memory": after, "dense_memory": before, "memory_fraction": after / before}
    if report.latency:
        after, before = report.latency
        shares = [group["density"] for group in report.groups.values()]
        row |= {"latency": after, "dense_latency": before}
        row["latency_fraction"] = shares[0] if len(shares) == 1 else after / before
    return row


def of_dense(model: nn.Module, example_inputs: Any, last: Row) -> Row:
    """The outcome of a dense training."""
    params = count_params(model)
    macs = count_macs(model, example_inputs)[""]
    return {
        "expected_density": None,
        "architecture": None,
        "test_error_percent": last["test_error_percent"],
        "feasible": None,
        **_sizes([params, params], [macs, macs]),
    }


def _sizes(params: list[int], macs: list[int]) -> Row:
    """[after, before] of each."""
    return {
        "params": params[0],
        "dense_params": params[1],
        "params_fraction": params[0] / params[1],
        "macs": macs[0],
        "dense_macs": macs[1],
        "macs_fraction": macs[0] / macs[1],
    }
