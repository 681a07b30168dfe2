"""`python -m bench.duals`: the duals and target schedules on five models, on digits.

Writes results.csv, summary.md and paths.png. Rows that are there are kept: it goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.short_runs import Run, mean, train, train_all

# Model, target, epochs.
MODELS = (
    ("mlp", 0.33, 40),
    ("lenet 8-16-64", 0.1, 100),
    ("bn conv", 0.25, 20),
    ("vit", 0.25, 20),
)
CUBIC: dict[str, Any] = {"target_schedule": "cubic"}
VARIANTS: dict[str, dict[str, Any]] = {
    "ascent, constant": {"target_schedule": "constant"},
    "ascent, cubic": CUBIC,
    "ascent, cubic, dual first": {**CUBIC, "dual_first": True},
    "ascent, cubic, no restarts": {**CUBIC, "restarts": False},
    "pi, constant": {"target_schedule": "constant", "dual": "pi"},
    "pi, cubic": {**CUBIC, "dual": "pi"},
    "augmented, cubic": {**CUBIC, "dual": "augmented"},
    "equality, cubic": {**CUBIC, "dual": "equality"},
}
SHOWN = ("mlp", 0.33, 40)


def runs(seeds: int) -> list[Run]:
    """All of them, a seed at a time."""
    return [
        Run("digits", model, target, seed, epochs, variant=name, options=options)
        for seed in range(seeds)
        for model, target, epochs in MODELS
        for name, options in VARIANTS.items()
    ]


def summary(rows: Sequence[dict[str, str]]) -> str:
    """A table for each model: means over the seeds."""
    lines: list[str] = []
    for model, target, epochs in MODELS:
        lines += ["", f"{model}, target {target:g}, {epochs} epochs", ""]
        lines.append(
            "| dual | error % | expected / target | pruned / target | highest lambda "
            "| late sd of lambda / highest | late density range / target | restarts | collapsed |"
        )
        lines.append("| --- " * 9 + "|")
        for name in VARIANTS:
            chosen = [
                row
                for row in rows
                if (row["model"], float(row["target"]), row["variant"]) == (model, target, name)
            ]
            if not chosen:
                continue
            most = mean(chosen, "multiplier_most")
            collapsed = sum(bool(row["collapsed"]) for row in chosen)
            cells = (
                name,
                f"{mean(chosen, 'test_error_percent'):.1f}",
                f"{mean(chosen, 'expected') / target:.3f}",
                f"{mean(chosen, 'pruned') / target:.3f}",
                f"{most:.3g}",
                f"{mean(chosen, 'multiplier_late_sd') / most:.3f}",
                f"{mean(chosen, 'density_late_range') / target:.3f}",
                f"{mean(chosen, 'restarts'):.1f}",
                f"{collapsed} of {len(chosen)}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:]) + "\n"


def plot(path: Path) -> None:
    """Density and multiplier by epoch, seed 0 of one model, each dual."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    model, target, epochs = SHOWN
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 8), sharex=True)
    for number, (name, options) in enumerate(VARIANTS.items()):
        run = Run("digits", model, target, 0, epochs, variant=name, options=options)
        _, rows = train(run, None)
        style = {"color": f"C{number}", "linestyle": ("-", "--")[number % 2], "linewidth": 1.3}
        at = [row["epoch"] for row in rows]
        above.plot(at, [row["density"]["model"] for row in rows], label=name, **style)
        below.plot(at, [row["lambda"]["model"] for row in rows], **style)
    above.axhline(target, color="black", linewidth=0.8)
    above.set_ylabel("expected density")
    above.legend(fontsize=8)
    below.set_ylabel("multiplier")
    below.set_xlabel("epoch")
    above.set_title(f"{model} on digits, target {target:g}, seed 0")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.duals", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "duals")
    arguments = parser.parse_args(argv)
    rows = train_all(runs(arguments.seeds), arguments.out / "results.csv", None)
    text = summary(rows)
    (arguments.out / "summary.md").write_text(text, encoding="utf-8")
    plot(arguments.out / "paths.png")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
