"""`python -m bench.zoo.axes`: every axis of the families of Hugging Face, at once.

Each family is a tiny random model with gates on its branches (depth), hidden width, heads, hidden
units of MLPs and experts, as far as it has them. Some gates are closed, and the pruned model is
compared in float64, in what it generates, and after a folder. Each has a process of its own; what
has been measured from the same commit stays. Exit code: 0 if every family is the same, else 1.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import ROOT, report
from bench.zoo.axes_row import AXES, PLAIN, SAME, Row
from bench.zoo.families import FAMILIES
from bench.zoo.process import row_of
from bench.zoo.table import alike, named
from l0fast._files import write_text

EQUAL = 1e-10
"""The largest relative error in float64 of a model that counts as the same function."""
HEAD = (
    "family", *AXES, "gated", "parameters", "error float64", "same text, cache", "without",
    "folder", "s",
)  # fmt: skip
EXPLAINED = """\
Tiny models with random weights, norms and biases. *depth* to *channels*: gates whose units are
gone / closed gates / all gates; *gated*: the share of the parameters that goes if all gates close;
*error*: the largest on fresh inputs of other sizes, relative to the largest output; *same text*:
whether 8 generated tokens are those of the gated model, in float64; *folder*: what loads the folder
of a model with equal widths (float32); *s*: seconds of CPU, for all of it. Encoders generate
nothing."""


def same(row: Row) -> bool:
    """Whether a pruned model is what the gated one was, in all that was asked."""
    texts = row.cache is not False and row.no_cache is not False
    folder = row.folder != "refused" and row.folder_error <= SAME
    return not row.failure and row.error <= EQUAL and texts and folder


def _cells(row: Row) -> tuple[str, ...]:
    if row.failure:
        return (row.name, row.failure.replace("|", "\\|"), *[""] * (len(HEAD) - 2))
    words = {True: "yes", False: "NO", None: "-"}
    gone = ("/".join(map(str, row.axes[axis])) if axis in row.axes else "-" for axis in AXES)
    folder = f"`{row.folder}`" if row.folder_error <= SAME else f"{row.folder} (NOT THE SAME)"
    after, before = row.params
    return (
        row.name,
        *gone,
        f"{row.gated:.0%}",
        f"{after / 1e3:.0f} k of {before / 1e3:.0f} k",
        f"{row.error:.1e}",
        words[row.cache],
        words[row.no_cache],
        folder,
        f"{row.seconds:.0f}",
    )


def markdown(rows: Sequence[Row], about: report.Facts) -> str:
    """The table, and what stays with its reasons."""
    lines = [
        "# Every axis of a family",
        "",
        f"`{about['command']}`, commit {about['commit']}, {about['date']}, torch {about['torch']}, "
        f"transformers {about['transformers']}, {about['cpu']}, one thread.",
        "",
        EXPLAINED,
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
        *(f"| {' | '.join(_cells(row))} |" for row in rows),
        "",
        "## Folders that plain `from_pretrained` does not load",
        "",
        *(f"- {row.name}: {row.folder_reason}" for row in rows if row.folder_reason),
        "",
        "## What stays",
        "",
        "Layers, branches and norms without gates of their own, and why; all in the JSON.",
        "",
    ]
    for row in (row for row in rows if row.kept):
        found = sorted(alike(row.kept), key=lambda pair: -len(pair[1]))
        lines += [f"- {row.name}", *(f"  - {named(names)}: {why}" for why, names in found)]
    return "\n".join(lines) + "\n"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.zoo.axes", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for each family")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "zoo")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in FAMILIES:
            parser.error(f"family: got {name!r}; expected one of {', '.join(FAMILIES)}")
    return arguments


def _measured(path: Path, commit: str, seed: int) -> dict[str, Row]:
    """Rows of an earlier run of the same commit."""
    if not path.is_file() or commit == "unknown" or commit.endswith("-dirty"):
        return {}
    rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    wanted = (row for row in rows if row.commit == commit and row.seed == seed)
    return {row.name: row for row in wanted if not row.failure}


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    arguments = _arguments(argv)
    seed = [f"--seed={arguments.seed}"] if arguments.seed else []
    command = shlex.join(["python", "-m", "bench.zoo.axes", *arguments.names, *seed])
    about = report.facts(command, 1, tested=False)
    about["transformers"] = report.version("transformers")
    commit, out = str(about["commit"]), arguments.out
    rows = _measured(out / "axes.json", commit, arguments.seed)
    names = arguments.names or list(FAMILIES)
    for name in names:
        if name not in rows:
            options = [name, str(arguments.seed)]
            entries: dict[str, Any] = {"name": name, "seed": arguments.seed}
            row = Row(**entries | row_of("bench.zoo.axes_row", options, arguments.limit))
            rows[name] = replace(row, commit=commit)
        print(" | ".join(_cells(rows[name])), flush=True)
        done = [rows[known] for known in FAMILIES if known in rows]
        lines = ",\n".join(json.dumps(asdict(row)) for row in done)
        whole = f'{{"about": {json.dumps(about, indent=1)},\n"rows": [\n{lines}\n]}}\n'
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "axes.json", whole)
        write_text(out / "axes.md", markdown(done, about))
    plain = sum(rows[name].folder == PLAIN for name in names)
    print(f"{plain} of {len(names)} folders are plain; axes.md, axes.json in {out}")
    return 0 if all(same(rows[name]) for name in names) else 1


if __name__ == "__main__":
    sys.exit(main())
