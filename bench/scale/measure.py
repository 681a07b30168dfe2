"""One model: gated, constrained, pruned, each step measured; as JSON lines on standard output.

Each step is told as soon as it is done, so that what a process did before it was ended is known.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn

import l0fast
from bench.scale.counts import counting
from bench.scale.memory import forget_peak, give_back, peak, resident
from bench.scale.models import MODELS, Entry
from bench.timing import one_line
from bench.zoo.measure import untrained

STEPS = ("sparsify_", "constraint", "prune")
TARGET = 0.5
CLOSED = -3.0
OPEN = (-1.0, 2.0)
"""log_alpha of the gates that stay, from the first to the last: values in evaluation 0.1 to 1."""
SEED = 0


@dataclass(frozen=True)
class Step:
    """The costs of one call. Memory is resident memory of the process, in bytes."""

    name: str
    seconds: float
    cpu_seconds: float
    """Of all threads: it says more than `seconds` beside other work."""
    before: int
    """Resident when it began."""
    peak: int
    """The most that was resident in it."""
    exports: int
    copies: int
    """Of the whole model, see `counts`."""


@dataclass
class Row:
    """The results of one model; a row of the table."""

    name: str
    params: int = 0
    dense: int = 0
    """Bytes of the dense model's parameters and buffers."""
    first_export: float = 0.0
    """Seconds of a first torch.export, of next to nothing: PyTorch loads what it needs."""
    peaks_reset: bool = True
    """Whether peaks are each step's own; if not, they are those since the process's start."""
    steps: list[Step] = field(default_factory=list)
    after: int = 0
    """Parameters that are left."""
    error: float | None = None
    """The largest relative error that prune found, and accepted."""
    failure: str = ""


def proven(small: Any) -> tuple[int, float]:
    """(parameters left, error) of a pruned model, by its report."""
    return small.report.params[0], small.report.max_error


def dense_model(entry: Entry) -> nn.Module:
    """The model, with numbers as training leaves them, so that its output depends on all of it."""
    return untrained(entry.build())


def close_half(model: nn.Module) -> None:
    """Closes every second gate of each layer, and leaves the others partly open, in their order."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "log_alpha":
                gates = parameter.view(-1)
                gates.copy_(torch.linspace(*OPEN, len(gates)))
                gates[1::2] = CLOSED


def _first_export() -> float:
    begin = time.perf_counter()
    torch.export.export(nn.Identity(), (torch.zeros(1),), strict=False)
    return time.perf_counter() - begin


def measure(name: str, entry: Entry) -> Iterator[Row]:
    """Yields the row of one model, each time that a step has been added."""
    row = Row(name)
    torch.manual_seed(SEED)
    model, example = dense_model(entry), entry.example()
    held = list(chain(model.parameters(), model.buffers()))
    row.params = sum(parameter.numel() for parameter in model.parameters())
    row.dense = sum(tensor.numel() * tensor.element_size() for tensor in held)
    row.first_export = _first_export()
    kept: list[Any] = []  # a user's constraint is alive when the model is pruned

    def sparsify() -> None:
        l0fast.sparsify_(model, example_inputs=example)

    def constrain() -> None:
        made: Any = l0fast.DensityConstraint(
            model,
            target=TARGET,
            measure=entry.measure,  # type: ignore[arg-type]
            example_inputs=example,
        )
        kept.append(made)

    def prune() -> None:
        kept.append(l0fast.prune(model, example))

    calls: dict[str, Callable[[], None]] = dict(
        zip(STEPS, (sparsify, constrain, prune), strict=True)
    )
    for step, call in calls.items():
        give_back()
        row.peaks_reset = forget_peak()
        before = resident() or 0
        with counting(model) as work:
            begin, cpu = time.perf_counter(), time.process_time()
            call()
            seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        row.steps.append(Step(step, seconds, cpu, before, peak(), work.exports, work.copies))
        if step == STEPS[0]:
            close_half(model)
        if step != STEPS[-1]:
            yield row
    row.after, row.error = proven(kept[-1])
    yield row


def main() -> int:
    """Measures the model named by the first argument."""
    name = sys.argv[1]
    # Prints of libraries must not mix with the rows.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(row: Row) -> None:
        answers.write(json.dumps(asdict(row)) + "\n")
        answers.flush()

    row = Row(name)
    try:
        for row in measure(name, MODELS[name]):
            say(row)
    except Exception as error:
        row.failure = one_line(error)
        say(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
