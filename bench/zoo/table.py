"""The results of the zoo, as a table in Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from bench.report import Facts, significant
from bench.zoo.measure import Result

HEAD = (
    "model", "layers", "gated", "weights gated", "gates", "removed / compacted / kept", "dead gone",
    "parameters", "MACs", "ms", "faster", "error float64", "float32", "tier", "sparsify_ s",
    "prune s",
)  # fmt: skip
PLAIN = (
    "name", "seed", "failure", "layers", "gated", "gates", "removed", "compacted", "kept", "tier",
    "dead", "gone", "gathered", "error_float64", "error_float32", "dense_ms", "pruned_ms",
    "speedup", "gating_seconds", "seconds",
)  # fmt: skip

LIBRARIES = ("torchvision", "timm", "transformers", "diffusers", "peft")
"""Where models come from: their versions are told."""

EXPLAINED = """\
Half of each layer's gates closed and the others partly open, at random; random weights and batch
norm statistics. *layers*: Linears and ordinary convolutions that run; *gated*: of them, with
gates; *weights gated*: the share of all layers' weights that the gated layers have; *removed /
compacted / kept*: what the report of `prune` says of layers with gates and of others that they
change; *dead gone*: of the parameters on which nothing hangs any more (by autograd, see
`bench/zoo/measure.py`), the share that no longer exists, with no gather or scatter in its place;
*left*: of the dense model's; *ms*: one forward of the example, median; *error*: the largest on
fresh inputs, relative to the largest output."""


def _percent(part: float, of: float) -> str:
    return f"{100 * part / of:.1f} %" if of else "-"


def _cells(row: Result) -> tuple[str, ...]:
    if row.failure:
        return (row.name, row.failure.replace("|", "\\|"), *[""] * (len(HEAD) - 2))
    (after, before), (macs, dense_macs) = row.params, row.macs
    return (
        row.name,
        str(row.layers),
        str(row.gated),
        _percent(*row.weights),
        f"{row.gates:,}",
        f"{row.removed} / {row.compacted} / {row.kept}",
        _percent(row.gone, row.dead),
        f"{before / 1e6:.2f} M, {_percent(after, before)} left",
        f"{dense_macs / 1e6:.0f} M, {_percent(macs, dense_macs)} left",
        f"{significant(row.dense_ms)} to {significant(row.pruned_ms)}" if row.dense_ms else "",
        f"{row.speedup:.2f}x" if row.speedup else "",
        f"{row.error_float64:.1e}",
        f"{row.error_float32:.1e}",
        row.tier,
        f"{row.gating_seconds:.1f}",
        f"{row.seconds:.1f}",
    )


def alike(reasons: Mapping[str, list[str]]) -> list[tuple[str, list[str]]]:
    """(the first of some reasons that differ in names and numbers alone, the layers of all)."""
    found: dict[str, tuple[str, list[str]]] = {}
    for why, names in reasons.items():
        kind = re.sub(r"'[^']*'|\d+", "", why)
        found.setdefault(kind, (why, []))[1].extend(names)
    return list(found.values())


def named(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _earlier(rows: Sequence[Result], about: Facts) -> list[str]:
    """The rows that other commits measured."""
    of: dict[str, list[str]] = {}
    for row in rows:
        if row.commit != about["commit"]:
            of.setdefault(row.commit or "an earlier commit", []).append(row.name)
    return [f"\nMeasured at {commit}: {', '.join(names)}." for commit, names in of.items()]


def markdown(rows: Sequence[Result], about: Facts, title: str) -> str:
    """The table, with what it holds for, and what stopped the models with dead weights left."""
    cells = [HEAD, *map(_cells, rows)]
    filled = [place for place in range(len(HEAD)) if any(row[place] for row in cells[1:])]
    table = [f"| {' | '.join(row[place] for place in filled)} |" for row in cells]
    versions = ", ".join(f"{name} {about[name]}" for name in LIBRARIES if about.get(name))
    lines = [
        f"# {title}",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['date']}, torch {about['torch']}, "
        f"{versions}, {about['cpu']}, one thread.",
        "",
        EXPLAINED,
        *_earlier(rows, about),
        "",
        table[0],
        f"|{' --- |' * len(filled)}",
        *table[1:],
        "",
        "## What stops the rest",
        "",
        "Dead parameters that stay or are gathered, by model:",
        "",
    ]
    for row in rows:
        if row.failure or row.gone == row.dead:
            continue
        lines.append(f"- {row.name}: {row.dead - row.gone:,} of {row.dead:,}")
        lines += [f"  - {named(names)}: {why}" for why, names in alike(row.not_removed)]
        lines += [f"  - {note}" for note in row.notes]
    lines += [
        "",
        "## Layers without gates",
        "",
        "How many, and why of the first; all in the JSON.",
        "",
    ]
    for row in (row for row in rows if row.without_gates):
        found = sorted(alike(row.without_gates), key=lambda pair: -len(pair[1]))
        lines += [f"- {row.name}", *(f"  - {len(names)}: {why}" for why, names in found)]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Result], about: Facts) -> str:
    """{"about": the facts, "rows": [...]}, one line a model."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    return f'{{"about": {json.dumps(about, indent=1)},\n"rows": [\n{lines}\n]}}\n'


def as_csv(rows: Sequence[Result]) -> str:
    """One line a model; sizes before and after in columns of their own."""
    text = io.StringIO()
    sizes = ("params_after", "params_before", "macs_after", "macs_before")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*PLAIN, *sizes])
    for row in rows:
        writer.writerow([*(getattr(row, name) for name in PLAIN), *row.params, *row.macs])
    return text.getvalue()
