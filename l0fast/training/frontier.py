"""Several targets from one run: error against size, a pruned model for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks, _metrics
from l0fast._files import write_atomically, write_text
from l0fast._tables import aligned
from l0fast.constraints.constraint import DensityConstraint
from l0fast.data.sets import Data
from l0fast.graph.calls import Example
from l0fast.graph.computed import copied
from l0fast.graph.sites import unchanged_if_refused
from l0fast.layers.handle import gated_layers
from l0fast.measures import amounts
from l0fast.measures.amounts import Asked, named
from l0fast.measures.latency import LatencyTable
from l0fast.measures.measure import Measure
from l0fast.plots.frontier import plot_frontier
from l0fast.pruning.draft import opened
from l0fast.pruning.stopwatch import whole_seconds
from l0fast.training.arguments import inputs_of
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.folder import RunFolder
from l0fast.training.ranks import Ranks
from l0fast.training.settings import TrainerSettings
from l0fast.training.summary import Summary
from l0fast.training.task import LossFn, MetricFn
from l0fast.training.trainer import Trainer

FRONTIER = "frontier.json"
PLOT = "frontier.png"
LATENCY_BATCH = 128
FALLING = "targets that fall, such as (0.5, 0.3, 0.1)"


def frontier(
    model: nn.Module,
    data: Data,
    settings: TrainerSettings,
    targets: Sequence[Asked],
    *,
    loss_fn: LossFn | None = None,
    metric: MetricFn | None = None,
    example_inputs: Any = None,
    out: str | Path | None = None,
    identity: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    table: LatencyTable | None = None,
    resume: bool = False,
    train: Callable[[Trainer], Summary] | None = None,
) -> list[Summary]:
    """Trains to the first target, prunes a copy, trains on to the next target, and so on.

    Each target has its own `settings.epochs` epochs, schedule and multipliers. Weights, gates,
    moments and generators continue from the run of the target before: from before its gates
    settled, or from its end if they do not settle. (The epochs after settling train only that
    target's own model; gates that settling closed may open again in the next run.) Each target is
    a run of a `Trainer` in the folder OUT/density-TARGET (density-0.5, density-100k-params).
    OUT/frontier.json has the rows, and OUT/frontier.png shows them. An interrupted frontier can be
    resumed within any target; all is the same bit for bit, except the times of a forward. On
    several processes each target is trained as by a `Trainer` there; the first process times and
    writes.

    Args:
        model, data, loss_fn, metric, example_inputs, out, identity, device, table: as in `Trainer`;
            the model is trained in place. Without a table, all targets use that of the first.
        settings: of every run; the target replaces their density.
        targets: falling targets of the whole model, by `settings.measure`: densities, or amounts
            such as "100k params".
        resume: whether to go on from the checkpoints in `out`.
        train: trains an open trainer to its end and returns its summary, for example with a
            progress bar; `Trainer.fit` by default.

    Returns:
        The summary of each target, with "milliseconds" and "dense_milliseconds": medians of one
        forward of LATENCY_BATCH test examples, timed side by side on this machine.

    Raises:
        ValueError, TypeError: the targets do not fall, or one cannot be met; the settings have
            other targets; `out` holds a run and `resume` is False; and as in `Trainer`. All this is
            checked before anything is trained.
    """
    targets = checked_targets(targets, settings.measure)
    if settings.penalty is not None or settings.layer_density is not None:
        _checks.refuse(
            "settings", "a penalty or layer_density", "neither, as `targets` has the densities"
        )
    ranks = Ranks.here()
    folder = None if out is None else Path(out)
    places = [None if folder is None else folder / folder_name(target) for target in targets]
    ranks.of_first(lambda: _check_places(filter(None, places), resume))
    # If the model has gates already, the dense model to be timed is a copy without them.
    dense = opened(model) if gated_layers(model) else copied(model)
    options: dict[str, Any] = {"identity": identity, "device": device, "table": table}
    options |= {"loss_fn": loss_fn, "metric": metric, "example_inputs": example_inputs}
    first = replace(settings, density=targets[0])
    with unchanged_if_refused(model):
        trainer = Trainer(model, data, first, out=places[0], **options)
        assert isinstance(trainer.term, DensityConstraint)
        _refuse_rising(targets, trainer.term)
    options["table"] = trainer.term.table
    start: Checkpoint | None = None
    rows: list[Summary] = []
    pruned: list[nn.Module] = []
    for number, (target, place) in enumerate(zip(targets, places, strict=True), start=1):
        if start is not None:
            chosen = replace(settings, density=target)
            trainer = Trainer(trainer.model, data, chosen, out=place, **options)
        trainer.open(resume, start, another_follows=number < len(targets))
        rows.append(trainer.fit() if train is None else train(trainer))
        start = trainer.next_start()
        assert trainer.pruned is not None
        pruned.append(trainer.pruned)
    example = _timed(trainer)

    def finish() -> list[Summary]:
        _time(rows, dense, pruned, example)
        if folder is not None:
            write_text(folder / FRONTIER, json.dumps(rows, indent=2) + "\n")
            write_atomically(folder / PLOT, lambda path: plot_frontier(rows, path))
        return rows

    return ranks.of_first(finish)


def _check_places(places: Iterable[Path], resume: bool) -> None:
    """Refuses folders of targets that are there and not resumed, or that cannot be written."""
    for place in places:
        if place.exists() and not resume:
            _checks.refuse("out", str(place), "a folder that does not exist yet (or resume it)")
        RunFolder(place).check()


def folder_name(target: Asked) -> str:
    """Name of the folder of one target."""
    if isinstance(target, str):
        return f"density-{'-'.join(target.split())}"
    short = f"{target:g}"
    return f"density-{short if float(short) == target else target}"


def _timed(trainer: Trainer) -> Any:
    """The inputs of a timed forward: test examples, if batches begin with the model's inputs."""
    example = trainer.example_inputs
    inputs = inputs_of(trainer.evaluation.test.first(LATENCY_BATCH))
    if inputs is None or not isinstance(example, Tensor):
        return example
    return inputs if inputs.shape[1:] == example.shape[1:] else example


def _time(rows: list[Summary], dense: nn.Module, pruned: list[nn.Module], examples: Any) -> None:
    """Adds to each row the milliseconds of its pruned model and of the dense one."""
    dense.to(next(pruned[0].parameters()).device)
    dense_seconds, *seconds = whole_seconds([dense, *pruned], Example.of(examples))
    for row, each in zip(rows, seconds, strict=True):
        row["milliseconds"], row["dense_milliseconds"] = 1000 * each, 1000 * dense_seconds


def checked_targets(targets: Sequence[Asked], measure: str) -> list[Asked]:
    """The targets, each checked for this measure."""
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        _checks.refuse("targets", targets, FALLING, TypeError)
    checked = [amounts.check(f"targets[{i}]", each, measure) for i, each in enumerate(targets)]
    if not checked:
        _checks.refuse("targets", checked, FALLING)
    return checked


def _refuse_rising(targets: Sequence[Asked], term: DensityConstraint) -> None:
    """Refuses targets that do not fall, or that cannot be met."""
    measure: Measure = term.__dict__["_measure"]
    (total,), (lowest,) = measure.totals, measure.lowest()
    shares = [
        amounts.share(f"targets[{i}]", target, term.measure, total, lowest)
        for i, target in enumerate(targets)
    ]
    if any(a <= b for a, b in pairwise(shares)):
        _checks.refuse("targets", list(targets), FALLING)


def format_frontier(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of a frontier as a table."""
    metric = _metrics.metric_of(rows[0])
    tested = f"test {_metrics.title(metric)}".replace("(%)", "%")
    head = ("target", "measure", tested, "density", "params", "MACs", "ms", "pruned to")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        lines.append(
            (
                named(row["target_density"]),
                row["measure"],
                _metrics.number(metric, row[_metrics.held_key(metric)]).removesuffix(" %"),
                f"{row['realised_density']:.4f}",
                f"{row['params']:,} ({100 * row['params_fraction']:.1f} %)",
                f"{row['macs']:,} ({100 * row['macs_fraction']:.1f} %)",
                f"{row['milliseconds']:.3g} of {row['dense_milliseconds']:.3g}",
                row["architecture"],
            )
        )
    return "\n".join(aligned(lines, left=2))
