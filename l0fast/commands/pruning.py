"""`l0fast prune` and `l0fast report`: the smaller model of a checkpoint, and what it would be."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.commands.values import layer_densities
from l0fast.commands.values import target as one_target
from l0fast.constraints.constraint import DensityConstraint
from l0fast.data import sets
from l0fast.gating.sparsify import sparsify_
from l0fast.graph.calls import Example
from l0fast.measures.amounts import Asked
from l0fast.measures.density import density
from l0fast.pruning.prune import prune as prune_model
from l0fast.pruning.report import required_report
from l0fast.pruning.saving import save_pruned
from l0fast.pruning.shrink import Removal, remove_
from l0fast.training import models
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.folder import PRUNED


def _rebuilt(path: Path) -> tuple[Checkpoint, nn.Module, Tensor]:
    """A checkpoint of `train`, the gated model in it, and an example of zeros."""
    checkpoint = Checkpoint.read(path, torch.device("cpu"), "checkpoint")
    identity = checkpoint.identity
    missing = {"dataset", "model", "widths", "recipe"} - identity.keys()
    if missing:
        expected = f"one that `l0fast train` wrote (this one does not name its {min(missing)})"
        _checks.refuse("checkpoint", str(path), expected)
    if checkpoint.term is None:
        _checks.refuse("checkpoint", str(path), "one of a model with gates (this one is dense)")
    dataset, name = identity["dataset"], identity["model"]
    _checks.one_of("dataset", dataset, sets.DATASETS)
    in_shape, num_classes = sets.FIXED.get(dataset) or (
        identity["in_shape"],
        identity["num_classes"],
    )
    if models.from_torchvision(name):
        in_shape = (sets.COLOURS, *in_shape[1:])
    model = models.build(name, in_shape, num_classes, identity["widths"])
    example = torch.zeros(1, *in_shape)
    if identity["recipe"] == "published":
        models.sparsify_published_(model, example, False)
    else:
        gates = identity.get("gates", "auto")
        sparsify_(model, gates=gates, example_inputs=example, skip=False)
    for entry in checkpoint.removals or []:
        remove_(model, Removal.from_json(entry), Example.of(example), False)
    checkpoint.refuse_other(path, identity, model)
    model.load_state_dict(checkpoint.selected[1])
    return checkpoint, model, example


def _pruned(
    checkpoint: Checkpoint, model: nn.Module, example: Tensor, target: str | None
) -> nn.Module:
    """The smaller model, within `target` (by the run's measure) or else what the run asked for."""
    # Latency as the run has measured it.
    measure = checkpoint.table or checkpoint.identity.get("measure", "gates")
    if target is not None:
        wanted = layer_densities(target, []) if "=" in target else one_target(target)
        return prune_model(model, example, wanted, measure=measure)
    asked: Asked | Mapping[str, Asked] | None = (
        checkpoint.identity["density"] or checkpoint.identity["layer_density"]
    )
    if asked is None:
        return prune_model(model, example)
    constraint = DensityConstraint(model, asked, measure=measure, example_inputs=example)
    return prune_model(model, example, constraint)


def prune(args: argparse.Namespace) -> int:
    """Writes the smaller model of a checkpoint, and says what it came to."""
    path = Path(args.checkpoint)
    out = path.with_name(PRUNED) if args.out is None else Path(args.out)
    if out.exists() and not args.force:
        _checks.refuse("out", str(out), "a file that is not there yet (--force replaces it)")
    small = _pruned(*_rebuilt(path), args.target)
    save_pruned(small, out)
    print(required_report(small))
    print(f"saved {out}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Says what is gated in a checkpoint, how dense it is, and what pruning would remove."""
    checkpoint, model, example = _rebuilt(Path(args.checkpoint))
    table = density(model, example)
    small = _pruned(checkpoint, model, example, args.target)
    identity = checkpoint.identity
    epoch, _ = checkpoint.selected
    done = f"epoch {epoch} of {identity['epochs']}"
    if epoch != checkpoint.epoch:
        done += f" (the best of {checkpoint.epoch})"
    print(f"{identity['model']} on {identity['dataset']}, {done}; gates:\n\n{table}")
    feasible = checkpoint.history[epoch - 1].get("feasible") if epoch else None
    if feasible is not None:
        words = "meet the target" if feasible else "do not meet the target: pruning closes more"
        print(f"\nthe gates {words}")
    print(f"\npruned, it would be:\n\n{required_report(small)}")
    return 0
