"""`python -m bench.feasible`: is every pruned model within its target, and how far below it?

Short trainings on digits, and a few on MNIST: all measures, targets from 0.03 to 0.9, gates on
units and on single weights, every dual, three seeds. Writes results.csv and summary.md. Rows that
are there are kept: it goes on where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.short_runs import Run, mean, train_all
from l0fast.constraints.dual import DUALS
from l0fast.data.formats import DATA_ROOT_VARIABLE
from l0fast.measures.measure import MEASURES

TARGETS = (0.03, 0.1, 0.3, 0.6, 0.9)
SEEDS = 3
EPOCHS = {"digits": 20, "mnist": 2}
SPLITS = ("measure", "target", "gates", "dual", "model", "dataset")


def runs() -> list[Run]:
    """All of them, a seed at a time; for each seed, measure and target two of the duals in turn."""
    found: list[Run] = []

    def add(dataset: str, model: str, seed: int, target: float, how: tuple[str, str, str]) -> None:
        gates, measure, dual = how
        options = {"measure": measure, "dual": dual}
        variant = f"{measure}, {dual}"
        epochs = EPOCHS[dataset]
        found.append(Run(dataset, model, target, seed, epochs, gates, variant, options))

    for seed in range(SEEDS):
        for place, target in enumerate(TARGETS):
            turn = [list(DUALS)[(place + seed + step) % len(DUALS)] for step in range(3)]
            for dual in turn[:2]:
                for measure in MEASURES:
                    add("digits", "mlp", seed, target, ("auto", measure, dual))
                add("digits", "mlp", seed, target, ("weight", "gates", dual))
            measure = MEASURES[(place + seed) % len(MEASURES)]
            add("digits", "lenet 8-16-64", seed, target, ("auto", measure, turn[2]))
            if seed == 0:
                add("mnist", "mlp", seed, target, ("auto", "gates", turn[2]))
    return found


def summary(rows: Sequence[dict[str, str]]) -> str:
    """What all of them came to, and by each of their sides."""
    failed = [row for row in rows if row.get("error")]
    done = [row for row in rows if not row.get("error")]
    within = sum(row["feasible"] == "True" for row in done)
    lines = [
        f"{len(rows)} trainings: {within} of {len(done)} pruned models are within their target; "
        f"{len(failed)} were refused. Shortfall is (target - pruned) / target, overshoot (expected "
        "before settling - target) / target, both in percent; forced are runs in which pruning "
        "had to close gates that were open.",
        "",
        "| runs with | of them | within | mean shortfall | largest | mean overshoot | forced "
        "| collapsed |",
        "| --- " * 8 + "|",
    ]

    def line(title: str, chosen: Sequence[dict[str, str]]) -> None:
        over = [100 * (float(r["expected"]) / float(r["target"]) - 1) for r in chosen]
        cells = (
            title,
            f"{len(chosen)}",
            f"{sum(row['feasible'] == 'True' for row in chosen)}",
            f"{mean(chosen, 'shortfall_percent'):.1f}",
            f"{max(float(row['shortfall_percent']) for row in chosen):.1f}",
            f"{sum(over) / len(over):.1f}",
            f"{sum(int(row['forced']) > 0 for row in chosen)}",
            f"{sum(bool(row['collapsed']) for row in chosen)}",
        )
        lines.append(f"| {' | '.join(cells)} |")

    line("anything", done)
    for row in done:
        row["measure"], row["dual"] = row["variant"].split(", ")
    for side in SPLITS:
        for value in dict.fromkeys(row[side] for row in done):
            line(f"{side} {value}", [row for row in done if row[side] == value])
    if failed:
        lines += ["", *sorted({row["error"] for row in failed})]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.feasible", description=__doc__)
    root = os.environ.get(DATA_ROOT_VARIABLE)
    parser.add_argument("--data-root", default=root, help=f"of MNIST; default: {root}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "feasible")
    parser.add_argument("--digits-only", action="store_true", help="without MNIST")
    arguments = parser.parse_args(argv)
    chosen = [run for run in runs() if run.dataset == "digits" or not arguments.digits_only]
    rows = train_all(chosen, arguments.out / "results.csv", arguments.data_root)
    text = summary(rows)
    (arguments.out / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(row.get("error") or row["feasible"] == "True" for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
