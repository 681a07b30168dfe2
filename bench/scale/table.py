"""Budgets, and what came out as a table in Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from bench.report import Facts, significant
from bench.scale.measure import STEPS, Row, Step
from bench.scale.memory import GIB
from bench.scale.models import Entry

DENSE_TIMES, EXTRA_GIB = 2.5, 1.0
"""Each step's peak may be so many times the dense model's bytes, and so much on top."""
EXPORTS, COPIES = 1, 2
"""Of all three steps together."""

HEAD = (
    "model", "parameters", "dense", *(f"{step} s" for step in STEPS), "in all s",
    *(f"{step} peak" for step in STEPS), "exports", "copies", "parameters left", "error", "budget",
)  # fmt: skip

EXPLAINED = """\
Random weights in float32; a constraint of half the parameters (`llama`, ViT) or MACs (ResNets);
half of each layer's gates closed and the others partly open before the model is pruned. *dense*:
GiB of the dense model's parameters and buffers; *s*: seconds by the clock, in brackets those of the
processor; *in all*: the three steps, and the first `torch.export` of the process, for which PyTorch
loads what it needs; *peak*: the most resident memory of the whole process in that step, Python and
PyTorch included, in GiB and as a multiple of the dense model's bytes, in brackets what the step
added to what was resident before it (freed memory is given back to the system between steps);
*exports*, *copies*: calls of `torch.export`, and copies of the whole model, with its weights or
without; *error*: the largest relative error that `prune` found between the pruned and the gated
model, on the example."""


def peak_budget(row: Row) -> float:
    """The largest peak of a step that is allowed, in bytes."""
    return DENSE_TIMES * row.dense + EXTRA_GIB * GIB


def in_all(row: Row) -> float:
    """Seconds of all steps, and of the first export."""
    return row.first_export + sum(step.seconds for step in row.steps)


def over_budget(row: Row, entry: Entry) -> list[str]:
    """The budgets that a row exceeds, in words; empty if it is within all of them."""
    found: list[str] = []
    for step in row.steps:
        if step.peak > peak_budget(row):
            most = f"{DENSE_TIMES:g} x dense + {EXTRA_GIB:g} GiB = {peak_budget(row) / GIB:.2f}"
            found.append(f"{step.name} peak {step.peak / GIB:.2f} GiB > {most}")
        if entry.gib is not None and step.peak > entry.gib * GIB:
            found.append(f"{step.name} peak {step.peak / GIB:.2f} GiB > {entry.gib:g}")
    if entry.seconds is not None and in_all(row) > entry.seconds:
        found.append(f"{in_all(row):.1f} s > {entry.seconds:g}")
    for title, most in (("exports", EXPORTS), ("copies", COPIES)):
        number = sum(getattr(step, title) for step in row.steps)
        if number > most:
            found.append(f"{number} {title} > {most}")
    return found


def _seconds(step: Step) -> str:
    return f"{significant(step.seconds)} ({significant(step.cpu_seconds)})"


def _peak(step: Step, dense: int) -> str:
    added = (step.peak - step.before) / GIB
    return f"{step.peak / GIB:.2f}, {step.peak / dense:.1f}x (+{added:.2f})"


def _cells(row: Row, entry: Entry) -> tuple[str, ...]:
    steps = {step.name: step for step in row.steps}

    def each(cell: Callable[[Step], str]) -> list[str]:
        return [cell(steps[name]) if name in steps else "-" for name in STEPS]

    whole = len(steps) == len(STEPS)
    verdict = "; ".join(filter(None, [row.failure, *over_budget(row, entry)]))
    return (
        row.name,
        f"{entry.params / 1e6:.1f} M",
        f"{row.dense / GIB:.2f}" if row.dense else "-",
        *each(_seconds),
        significant(in_all(row)) if whole else "-",
        *each(lambda step: _peak(step, row.dense)),
        str(sum(step.exports for step in row.steps)),
        str(sum(step.copies for step in row.steps)),
        f"{row.after / row.params:.1%}" if row.error is not None else "-",
        f"{row.error:.1e}" if row.error is not None else "-",
        verdict.replace("|", "\\|") or "within",
    )


def markdown(rows: Sequence[Row], entries: Mapping[str, Entry], about: Facts) -> str:
    """The table, with what it holds for."""
    lines = [
        "# Time and memory against parameters",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['date']}, torch {about['torch']}, "
        f"{about['cpu']}, {about['threads']} threads on {about['cores']} cores, load at start "
        f"{about['load_at_start']:.1f}.",
        "",
        EXPLAINED,
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
        *(f"| {' | '.join(_cells(row, entries[row.name]))} |" for row in rows),
        "",
        f"Budgets: each peak at most {DENSE_TIMES:g} x dense + {EXTRA_GIB:g} GiB; {EXPORTS} export "
        f"and {COPIES} copies in all.",
    ]
    for row in rows:
        entry = entries[row.name]
        own = [f"{entry.seconds:g} s in all"] if entry.seconds is not None else []
        own += [f"{entry.gib:g} GiB"] if entry.gib is not None else []
        lines += [f"{row.name}: {', '.join(own)}."] if own else []
    if not all(row.peaks_reset for row in rows):
        lines += ["", "This system cannot reset a peak: each is that since the process's start."]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], entries: Mapping[str, Entry], about: Facts) -> str:
    """{"about": the facts, "rows": [...]}, each row with what it took too much of."""
    told = [asdict(row) | {"over_budget": over_budget(row, entries[row.name])} for row in rows]
    return json.dumps({"about": about, "rows": told}, indent=1) + "\n"
