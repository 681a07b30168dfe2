"""Makes the summary of a finished run: the contents of summary.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from l0fast._metrics import held_key, validation_key
from l0fast.constraints.stall import last_messages
from l0fast.measures.flops import count_macs, count_params
from l0fast.pruning.prune import prune
from l0fast.pruning.report import Report, required_report
from l0fast.training.metrics import Evaluation, Row
from l0fast.training.precision import Precision
from l0fast.training.run_state import RunState
from l0fast.training.settings import TrainerSettings

Summary = dict[str, Any]


def summarise(
    identity: Mapping[str, Any],
    settings: TrainerSettings,
    state: RunState,
    epoch: int,
    outcome: Summary,
    cuda_graph: str,
) -> Summary:
    """The summary of a run.

    Args:
        identity: facts about model and data; the summary begins with them.
        settings: of the run.
        state: after the last epoch.
        epoch: whose model is the result.
        outcome: of that model, as returned by `result_of`.
        cuda_graph: whether steps were captured, in words.
    """
    held, validation = held_key(state.metric), validation_key(state.metric)
    return {
        **identity,
        **_asked(settings),
        **outcome,
        f"best_{held}": min((row[held] for row in state.history), key=_in_order),
        "selected_epoch": epoch,
        validation: state.history[epoch - 1].get(validation),
        "metric": state.metric,
        "stalls": last_messages(state.history),
        "seconds": round(state.seconds, 3),
        "settings": asdict(settings),
        "device": str(state.device),
        "cuda_graph": cuda_graph,
        "torch": torch.__version__,
    }


def _in_order(value: float) -> float:
    """What numbers are sorted by: NaN comes last."""
    return math.inf if math.isnan(value) else value


def _asked(settings: TrainerSettings) -> Summary:
    """The targets and settings of the run."""
    return {
        "seed": settings.seed,
        "epochs": settings.epochs,
        "target_density": settings.density,
        "target_layer_density": settings.layer_density,
        "measure": settings.measure,
        "method": settings.method,
        "penalty": settings.penalty,
    }


def result_of(
    state: RunState, settings: TrainerSettings, evaluation: Evaluation, example_inputs: Any
) -> tuple[int, nn.Module | None, Summary]:
    """(epoch of the result, pruned model or None without gates, outcome), after the last epoch.

    The pruned model is evaluated in float32.
    """
    epoch, model = state.selected()
    if state.term is None:
        key = held_key(state.metric)
        tested = {key: state.history[epoch - 1][key]}
        return epoch, None, outcome_of_dense(model, example_inputs, tested)
    pruned = prune(model, example_inputs, state.term)
    tested = replace(evaluation, precision=Precision("fp32", state.device)).tested(pruned, epoch)
    report = required_report(pruned)
    outcome = outcome_of_pruned(report, settings, state.history, epoch, tested)
    return epoch, pruned, outcome


def outcome_of_pruned(
    report: Report,
    settings: TrainerSettings,
    history: list[Row],
    epoch: int,
    tested: Mapping[str, float],
) -> Summary:
    """The outcome of a run with gates: size and error of its pruned model.

    Args:
        report: what `prune` reported.
        settings, history: of the run.
        epoch: whose model was pruned.
        tested: key -> the metric of the pruned model.
    """
    before_settling = history[min(epoch, settings.settles_at) - 1]
    groups = report.groups.values()
    feasible = all(group["density"] <= group["target"] for group in groups)
    return {
        "expected_density": history[epoch - 1]["expected_density"],
        "realised_density": report.density,
        "forced": report.forced,
        "collapsed": report.collapsed,
        "reopened": [name for name in before_settling["collapsed"] if name not in report.collapsed],
        "architecture": report.architecture,
        **tested,
        "feasible": feasible if settings.penalty is None else None,
        **_sizes(report.params, report.macs),
        **_memory_and_latency(report),
    }


def outcome_of_dense(model: nn.Module, example_inputs: Any, tested: Mapping[str, float]) -> Summary:
    """The outcome of a dense training; `tested` as in `outcome_of_pruned`."""
    params = count_params(model)
    macs = count_macs(model, example_inputs)[""]
    return {
        "expected_density": None,
        "architecture": None,
        **tested,
        "feasible": None,
        **_sizes([params, params], [macs, macs]),
    }


def _sizes(params: list[int], macs: list[int]) -> Summary:
    """Sizes and shares, from [after, before] of each."""
    return {
        "params": params[0],
        "dense_params": params[1],
        "params_fraction": params[0] / params[1],
        "macs": macs[0],
        "dense_macs": macs[1],
        "macs_fraction": macs[0] / macs[1],
    }


def _memory_and_latency(report: Report) -> Summary:
    """Memory, and latency if the run has a latency table."""
    after, before = report.memory
    found: Summary = {"memory": after, "dense_memory": before, "memory_fraction": after / before}
    if report.latency:
        after, before = report.latency
        shares = [group["density"] for group in report.groups.values()]
        found |= {"latency": after, "dense_latency": before}
        # With one target, its share by the table, which the target limits.
        found["latency_fraction"] = shares[0] if len(shares) == 1 else after / before
    return found
