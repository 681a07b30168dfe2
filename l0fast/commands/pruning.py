"""`l0fast prune` writes the pruned model of a checkpoint; `l0fast report` only describes it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.commands import values
from l0fast.constraints.constraint import DensityConstraint
from l0fast.data import sets
from l0fast.gating.sparsify import sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.measures.amounts import Asked
from l0fast.measures.density import density
from l0fast.pruning.prune import prune as prune_model
from l0fast.pruning.report import required_report
from l0fast.pruning.saving import save_pruned
from l0fast.training import models
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.entries import Entries
from l0fast.training.folder import PRUNED
from l0fast.training.histories import Rows
from l0fast.training.matching import check_model
from l0fast.training.removals import check_removals
from l0fast.training.settings import BEFORE, TrainerSettings
from l0fast.training.task import TASKS

LARGEST = 2**16
"""The largest side of an example, and the largest number of classes, that are accepted."""


class Trained(NamedTuple):
    """What a checkpoint of `train` holds."""

    checkpoint: Checkpoint
    settings: TrainerSettings
    model: nn.Module
    """With gates."""
    example: Tensor
    """Of zeros."""


def _settings(entries: Entries, identity: dict[str, Any]) -> TrainerSettings:
    """The settings of the run, from its checkpoint."""
    missing = {"dataset", "model", "widths", "recipe", "epochs", "density"} - identity.keys()
    if missing:
        entries.refuse("identity", f"has no {min(missing)!r}: `l0fast train` did not write it")
    for name in ("dataset", "model", "recipe"):
        entries.kind(f"identity.{name}", identity[name], str)
    if identity["recipe"] not in values.RECIPES or identity["dataset"] not in sets.KINDS:
        entries.refuse("identity", "names an unknown data set or recipe")
    known = {one.name for one in fields(TrainerSettings)}
    saved = {name: value for name, value in (BEFORE | identity).items() if name in known}
    try:
        return TrainerSettings(**saved)
    except (ValueError, TypeError) as error:
        entries.refuse("identity", f"does not describe a run ({_checks.one_line(error)})")


def _sizes(entries: Entries, identity: dict[str, Any]) -> tuple[tuple[int, ...], int]:
    """The shape of an example, and the number of classes."""
    fixed = sets.FIXED.get(identity["dataset"])
    if fixed is not None:
        return fixed
    shape: Any = identity.get("in_shape")
    classes: Any = identity.get("num_classes")
    entries.kind("identity.in_shape", shape, list)
    for size in (*shape, classes):
        entries.whole("identity.in_shape and num_classes", size, 1, LARGEST)
    return tuple(shape), classes


def _refuse_unnamed_code(path: Path, name: str, named: str | None) -> None:
    """Refuses to import code that a checkpoint names, unless the user names the same."""
    if ":" in name and named is None:
        words = f"--model {name} beside it: the checkpoint names code, which pruning would run"
        _checks.refuse("checkpoint", str(path), words)
    if named is not None and named != name:
        _checks.refuse("model", named, f"{name!r}, which the checkpoint {path} names")


def _rebuilt(path: Path, named: str | None) -> Trained:
    """Reads a checkpoint of `train` and builds its gated model; `named` is that of `--model`."""
    checkpoint = Checkpoint.read(path, torch.device("cpu"), "checkpoint")
    entries = Entries(path, "checkpoint", "one that `l0fast train` wrote")
    identity = checkpoint.identity
    settings = _settings(entries, identity)
    if checkpoint.term is None or not settings.gated:
        _checks.refuse("checkpoint", str(path), "one of a model with gates (this one is dense)")
    entries.whole("epoch", checkpoint.epoch, 0, settings.epochs)
    name = identity["model"]
    _refuse_unnamed_code(path, name, named)
    in_shape, num_classes = _sizes(entries, identity)
    widths = identity["widths"]
    if widths is not None:
        entries.kind("identity.widths", widths, list)
    if models.from_torchvision(name) and len(in_shape) == 3:
        in_shape = (sets.COLOURS, *in_shape[1:])
    model = models.build(name, in_shape, num_classes, widths)
    example = torch.zeros(1, *in_shape)
    if identity["recipe"] == "published":
        models.sparsify_published_(model, example, False)
    else:
        sparsify_(model, gates=settings.gates, example_inputs=example, skip=False)
    groups = checkpoint.term.get("_extra_state", {}).get("groups", [])
    entries.kind("term._extra_state.groups", groups, list)
    constraints = [group[0] for group in groups if isinstance(group, list) and group]
    metric = TASKS[settings.task].metric
    Rows(settings, gated_layers(model), constraints, None, metric).check(entries, checkpoint)
    if checkpoint.removals is not None:
        check_removals(entries, checkpoint.removals, model, Example.of(example))
    checkpoint.refuse_other_model(path, model)
    state = checkpoint.selected[1]
    check_model(entries, "model", state, model)
    model.load_state_dict(state)
    return Trained(checkpoint, settings, model, example)


def _pruned(trained: Trained, target: str | None) -> nn.Module:
    """The pruned model, within `target` (by the run's measure) or else the run's own target."""
    checkpoint, settings, model, example = trained
    # The latency that the run has measured.
    measure = checkpoint.table or settings.measure
    if target is not None:
        wanted = values.layer_densities(target, []) if "=" in target else values.target(target)
        return prune_model(model, example, wanted, measure=measure)
    asked: Asked | Mapping[str, Asked] | None = settings.density or settings.layer_density
    if asked is None:
        return prune_model(model, example)
    constraint = DensityConstraint(model, asked, measure=measure, example_inputs=example)
    return prune_model(model, example, constraint)


def prune(args: argparse.Namespace) -> int:
    """Writes the pruned model of a checkpoint, and prints its report."""
    path = Path(args.checkpoint)
    out = path.with_name(PRUNED) if args.out is None else Path(args.out)
    if out.exists() and not args.force:
        _checks.refuse("out", str(out), "a file that does not exist yet (--force replaces it)")
    small = _pruned(_rebuilt(path, args.model), args.target)
    save_pruned(small, out)
    print(required_report(small))
    print(f"saved {out}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Prints the gated layers of a checkpoint, their densities, and what pruning would remove."""
    trained = _rebuilt(Path(args.checkpoint), args.model)
    checkpoint = trained.checkpoint
    table = density(trained.model, trained.example)
    small = _pruned(trained, args.target)
    identity = checkpoint.identity
    epoch, _ = checkpoint.selected
    done = f"epoch {epoch} of {trained.settings.epochs}"
    if epoch != checkpoint.epoch:
        done += f" (the best of {checkpoint.epoch})"
    print(f"{identity['model']} on {identity['dataset']}, {done}; gates:\n\n{table}")
    feasible = checkpoint.history[epoch - 1].get("feasible") if epoch else None
    if feasible is not None:
        words = "meet the target" if feasible else "do not meet the target: pruning closes more"
        print(f"\nthe gates {words}")
    print(f"\npruned, it would be:\n\n{required_report(small)}")
    return 0
