"""`l0fast train`: trains, prunes, and prints the result."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast._metrics import held_key, in_words, metric_of, number
from l0fast.commands import values
from l0fast.commands.processes import joined
from l0fast.commands.progress import collapse, run
from l0fast.commands.setup import set_up
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import METRICS, PLOT, PRUNED, SUMMARY, RunFolder
from l0fast.training.frontier import FRONTIER, checked_targets, format_frontier, frontier
from l0fast.training.frontier import PLOT as FRONTIER_PLOT
from l0fast.training.ranks import Ranks
from l0fast.training.settings import WITHOUT_GATES, TrainerSettings
from l0fast.training.trainer import Trainer


def _checked_out(args: argparse.Namespace, ranks: Ranks, named: str | None) -> Path:
    """The folder of the run, or of the runs to the targets `named`. Words that can only be wrong,
    and a folder that cannot be written, are refused here: before any data are read."""
    settings = values.asked(args)
    out = Path(args.out) if args.out else _default_out(args, settings, named)
    ranks.of_first(lambda: RunFolder(out).check(args.resume))
    return out


def _default_out(args: argparse.Namespace, settings: TrainerSettings, named: str | None) -> Path:
    kind = "dense"
    method = "" if settings.method == "l0" else f"{settings.method}-"
    if settings.penalty is not None:
        kind = f"penalty-{args.penalty}"
    elif settings.gated:
        measure = "density" if settings.measure == "gates" else settings.measure
        kind = f"{method}{measure}-{named or args.layer_density}".replace(" ", "")
    model = args.model.replace(":", ".")
    return Path("runs") / f"{values.dataset(args)[0]}-{model}-{kind}-seed-{settings.seed}"


def train(args: argparse.Namespace) -> int:
    """Trains, prunes, writes everything into --out, and prints the result."""
    with joined(args) as ranks:
        return _train(args, ranks)


def _train(args: argparse.Namespace, ranks: Ranks) -> int:
    if args.density is not None and "," in args.density:
        return _frontier(args, ranks)
    out = _checked_out(args, ranks, args.density)
    setup = set_up(args)
    settings = setup.settings()
    trainer = setup.trainer(settings, out)
    trainer.open(args.resume)
    summary = run(trainer, args.quiet)
    if args.compare_dense and settings.gated:
        baseline = setup.trainer(_dense(settings), out / "dense")
        baseline.open(ranks.of_first((out / "dense" / CHECKPOINT).exists))
        dense = run(baseline, args.quiet)
        held = held_key(trainer.task.metric)
        summary[f"dense_{held}"] = dense[held]
        summary["dense_seconds"] = dense["seconds"]
        trainer.write_summary(summary)
    if ranks.first:
        _result(summary, out, trainer)
    return 0


def _frontier(args: argparse.Namespace, ranks: Ranks) -> int:
    """Trains to several targets, one after the other, and prints their table."""
    if args.compare_dense:
        _checks.refuse("compare_dense", True, "one --density beside it")
    targets = [values.target(part.strip()) for part in args.density.split(",")]
    first = argparse.Namespace(**vars(args) | {"density": targets[0]})
    out = _checked_out(first, ranks, args.density)
    checked_targets(targets, args.measure)
    setup = set_up(first)
    rows = frontier(
        setup.build(True),
        setup.data,
        setup.settings(),
        targets,
        example_inputs=setup.example,
        out=out,
        identity=setup.identity,
        device=args.device,
        table=setup.table,
        resume=args.resume,
        train=lambda trainer: run(trainer, args.quiet),
    )
    if ranks.first:
        print(format_frontier(rows))
        print(f"  plot   {out / FRONTIER_PLOT}\n  all    {out / FRONTIER}, {out}/density-*")
    return 0


def _dense(settings: TrainerSettings) -> TrainerSettings:
    """The same training without a target."""
    return replace(settings, **WITHOUT_GATES)


def _result(summary: dict[str, Any], out: Path, trainer: Trainer) -> None:
    """Prints the result of the run."""
    metric = metric_of(summary)
    error = f"test {in_words(metric, summary[held_key(metric)])}"
    dense = summary.get(f"dense_{held_key(metric)}")
    if trainer.pruned is None:
        print(f"dense model: {error}, {summary['params']:,} parameters")
    else:
        if summary["feasible"] is not None:
            words = "within" if summary["feasible"] else "OVER"
            target = summary["target_density"] or "the target of each layer"
            measure = summary["measure"]
            name, key = "density", "realised_density"
            if measure != "gates":
                name, key = measure, f"{measure}_fraction"
            print(f"{name} {summary[key]:.4f}, {words} {target}")
        if summary["collapsed"]:
            print(collapse(summary["collapsed"], trainer))
        if summary["reopened"]:
            names = ", ".join(summary["reopened"])
            print(
                f"reopened: all gates of {names} were closed before settling; some are open again"
            )
        beside = "" if dense is None else f" (dense: {number(metric, dense)})"
        print(f"pruned model {summary['architecture']}: {error}{beside}")
        for unit in ("params", "macs"):
            small, full = summary[unit], summary[f"dense_{unit}"]
            print(f"  {unit:<6} {small:>9,} of {full:>9,} ({100 * small / full:.1f} %)")
        print(f"  saved  {out / PRUNED}")
    print(f"  plot   {out / PLOT}\n  all    {out / SUMMARY}, {out / METRICS}")
