"""One model of the zoo: gated, half its gates closed, pruned, compared; as JSON on standard output.

A parameter is *dead* if the gradient of the model's output with respect to it is exactly zero with
the gates as they are, and not with all of them open. This is asked of autograd, not of the analysis
that prunes, on several inputs and with other weights, so that no unit counts as dead for being
negative in front of a ReLU by chance. It is *gone* if the pruned model does not have it and no
gather or scatter stands in for it.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import l0fast
from bench.timing import Effort, cpu_sample, interleaved, paired_ratios, quartiles
from bench.zoo.models import Entry, to_compare
from bench.zoo.names import entry_of
from l0fast.graph.calls import Example
from l0fast.graph.compare import relative_error, tensors_of
from l0fast.layers.handle import gated_layers
from l0fast.pruning.edits import weight_sides
from l0fast.pruning.precision import widened
from l0fast.pruning.report import Report

PROBES = 16
"""How many inputs and weights tell which parameters are dead with the gates as they are."""
PROBES_OPEN = 4
"""And which are not, with all gates open."""
FRESH = 3
"""How many fresh inputs compare the models."""
CLOSED, OPEN = -3.0, 3.0
FRACTIONAL = (-1.2, 1.4)
"""log_alpha of the gates that stay: their values in evaluation are 0.07 to 0.97."""
EFFORT = Effort(rounds=15, warmup=2, sample_ms=5.0)


@dataclass
class Result:
    """The results of one model; a row of the table."""

    name: str
    seed: int
    failure: str = ""
    commit: str = ""
    """Of the code that was measured."""
    gating_seconds: float = 0.0
    """Of `sparsify_`."""
    seconds: float = 0.0
    """Of `prune`."""
    layers: int = 0
    """Linears and ordinary convolutions that run."""
    gated: int = 0
    weights: tuple[int, int] = (0, 0)
    """(of the gated layers, of all that run)."""
    gates: int = 0
    removed: int = 0
    compacted: int = 0
    kept: int = 0
    """Layers with gates, or changed by those of others, by the report's word for each."""
    tier: str = ""
    params: tuple[int, int] = (0, 0)
    """(after, before)."""
    macs: tuple[int, int] = (0, 0)
    dead: int = 0
    gone: int = 0
    gathered: int = 0
    """Dead parameters that the pruned model does not have, but for which a gather or scatter is."""
    error_float64: float = math.inf
    error_float32: float = math.inf
    """Largest relative error on fresh inputs."""
    dense_ms: float = 0.0
    pruned_ms: float = 0.0
    speedup: float = 0.0
    """Median of the dense model's time over the pruned one's, round by round, one CPU thread."""
    last_lines: list[str] = field(default_factory=list)
    """What the process printed last, if it failed."""
    notes: list[str] = field(default_factory=list)
    not_removed: dict[str, list[str]] = field(default_factory=dict)
    """Why a layer is compacted or kept -> the layers."""
    without_gates: dict[str, list[str]] = field(default_factory=dict)
    """Why a layer has no gates -> the layers."""
    dead_but_there: dict[str, int] = field(default_factory=dict)
    """Parameter -> how many dead numbers of it are not gone."""


def untrained(model: nn.Module) -> nn.Module:
    """Numbers as training leaves them where initialisation puts zeros and ones."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                statistics = module.running_mean, module.running_var
                if statistics[0] is not None and statistics[1] is not None:
                    statistics[0].normal_(std=0.3)
                    statistics[1].uniform_(0.5, 2.0)
        for parameter in model.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.view(-1)[0]).all()):
                parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    return model


def set_gates(model: nn.Module) -> None:
    """Closes half of each layer's gates, and leaves the others partly open."""
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.uniform_(*FRACTIONAL)
            number = layer.log_alpha.numel()
            layer.log_alpha.view(-1)[torch.randperm(number)[: number // 2]] = CLOSED


def influential(model: nn.Module, entry: Entry, probes: int) -> dict[str, Tensor]:
    """Parameter -> bool of its shape: whether the output's gradient is anywhere not zero."""
    model = copy.deepcopy(model).requires_grad_()
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not name.endswith("log_alpha")
    }
    found = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in parameters.items()}
    for _ in range(probes):
        with torch.no_grad():
            for parameter in parameters.values():
                size = parameter.square().mean().sqrt()
                parameter.copy_(size * torch.randn_like(parameter))
        outputs = tensors_of(widened(Example.of(entry.example()), torch.float64).call(model))
        score = torch.stack(
            [(t * torch.randn_like(t)).sum() for t in outputs if t.is_floating_point()]
        ).sum()
        grads = torch.autograd.grad(score, list(parameters.values()), allow_unused=True)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                found[name] |= grad != 0
    return found


def _left_out(report: Report, model: nn.Module, name: str, shape: torch.Size) -> Any:
    """Two bool tensors of a parameter's shape: gone, and left out by a gather or scatter."""
    gone = torch.zeros(shape, dtype=torch.bool)
    gathered = gone.clone()
    module, _, _ = name.rpartition(".")
    edit = next((edit for edit in report.layers if edit["name"] == module), None)
    if edit is None or not shape:
        return gone, gathered
    stay = {"input": (edit["inputs"], edit["gather"]), "output": (edit["outputs"], edit["scatter"])}
    sides = weight_sides(model.get_submodule(module)) if len(shape) > 1 else ("output",)
    for dim, side in enumerate(sides):
        stays, moved = stay[side]
        if stays is not None:
            left = torch.ones(shape[dim], dtype=torch.bool)
            left[stays] = False
            into = gone if moved is None else gathered
            into |= left.view(-1, *[1] * (len(shape) - dim - 1))
    return gone, gathered & ~gone


def _count_dead(result: Result, model: nn.Module, small: Any, entry: Entry) -> None:
    opened = copy.deepcopy(model)
    with torch.no_grad():
        for layer in gated_layers(opened).values():
            layer.log_alpha.fill_(OPEN)
    before, alive = influential(opened, entry, PROBES_OPEN), influential(model, entry, PROBES)
    for name, of in before.items():
        dead = of & ~alive[name]
        gone, gathered = _left_out(small.report, model, name, dead.shape)
        result.dead += int(dead.sum())
        result.gone += int((dead & gone).sum())
        result.gathered += int((dead & gathered).sum())
        left = int((dead & ~gone).sum())
        if left:
            result.dead_but_there[name] = left


def _largest_error(one: nn.Module, other: nn.Module, inputs: list[Example]) -> float:
    with torch.no_grad():
        return max(
            relative_error(tensors_of(example.call(one)), tensors_of(example.call(other)))
            for example in inputs
        )


def _time(result: Result, dense: nn.Module, small: nn.Module, example: Example) -> None:
    def call(model: nn.Module) -> Any:
        def run() -> object:
            with torch.no_grad():
                return example.call(model)

        return run

    calls = {"dense": call(dense), "pruned": call(small)}
    samples, failures = interleaved(calls, cpu_sample, EFFORT)
    if failures:
        raise RuntimeError(f"not timed: {failures}")
    result.dense_ms = quartiles(samples["dense"]).p50
    result.pruned_ms = quartiles(samples["pruned"]).p50
    result.speedup = paired_ratios(samples["dense"], samples["pruned"]).p50


def _read_report(result: Result, report: Report) -> None:
    status = Counter(site["status"] for site in report.sites)
    result.removed, result.compacted, result.kept = (
        status[word] for word in ("removed", "compacted", "kept")
    )
    result.tier, result.notes = report.tier, report.notes
    result.params = report.params[0], report.params[1]
    result.macs = report.macs[0], report.macs[1]
    for site in report.sites:
        if site["status"] != "removed":
            result.not_removed.setdefault(site["reason"], []).append(site["name"])


def _weights(layer: nn.Module) -> int:
    found = getattr(layer, "weight", None)
    return found.numel() if isinstance(found, Tensor) else 0


def measure(name: str, entry: Entry, seed: int = 0, timed: bool = True) -> Result:
    """Measures one row.

    Args:
        name: of the row.
        entry: the model.
        seed: of weights, statistics, gates and inputs.
        timed: whether latencies are measured.
    """
    result = Result(name, seed)
    torch.manual_seed(seed)
    dense = untrained(entry.build()).eval()
    example = entry.example()
    table = l0fast.sparsify_(copy.deepcopy(dense), example_inputs=example, dry_run=True)
    result.layers = len(table.layers)
    for row in table.layers:
        if not row.gates:
            result.without_gates.setdefault(row.reason, []).append(row.name)
    result.notes += [table.note] if table.note else []
    model, inputs, in_float64 = to_compare(dense, Example.of(example))
    begin = time.perf_counter()
    l0fast.sparsify_(model, example_inputs=inputs, density_init=0.7, skip=False)
    result.gating_seconds = time.perf_counter() - begin
    set_gates(model)
    layers = gated_layers(model)
    # An attention of nn.MultiheadAttention has its layers only now.
    weights = {row.name: _weights(model.get_submodule(row.name)) for row in table.layers}
    result.gated = len(layers)
    result.weights = sum(weights.get(name, 0) for name in layers), sum(weights.values())
    result.gates = sum(layer.num_gates for layer in layers.values())

    begin = time.perf_counter()
    small: Any = l0fast.prune(model, inputs)
    result.seconds = time.perf_counter() - begin
    notes = result.notes
    _read_report(result, small.report)
    result.notes = notes + result.notes

    fresh = [Example.of(entry.example()) for _ in range(FRESH)]
    model.eval()
    small, model = small.double(), model.double()
    with in_float64():
        of = [widened(one, torch.float64) for one in fresh]
        result.error_float64 = _largest_error(small, model, of)
        _count_dead(result, model, small, entry)
    small = small.float()
    result.error_float32 = _largest_error(small, copy.deepcopy(model).float(), fresh)
    del model
    if timed:
        _time(result, dense, small, fresh[0])
    return result


def main() -> int:
    """Measures the model and seed that the command line names, within its seconds."""
    # Prints of libraries must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    name, seed, timed = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "timed"
    faulthandler.dump_traceback_later(float(sys.argv[4]), exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answer.write(json.dumps(asdict(measure(name, entry_of(name), seed, timed))))
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
