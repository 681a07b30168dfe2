"""The commands: from words to a training, to the smaller model of a checkpoint, to a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks, data, models
from l0fast.checkpoint import CHECKPOINT, Checkpoint
from l0fast.constraint import DensityConstraint
from l0fast.density import density
from l0fast.draw import gated_layers
from l0fast.prune import format_report
from l0fast.prune import prune as prune_model
from l0fast.saving import save_pruned
from l0fast.settings import MAX_SEED, TrainerSettings
from l0fast.sparsify import sparsify_
from l0fast.trainer import METRICS, PLOT, PRUNED, SUMMARY, Trainer

RECIPES = ("default", "published")
SKIP: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"epochs": 30, "batch_size": 128, "lr": 1e-3} for name in data.DATASETS},
    "digits": {"epochs": 100, "batch_size": 64, "lr": 3e-3},
}
"""Defaults that go with the size of a data set."""


# --- train ---------------------------------------------------------------------------------------


def _number(name: str, text: Any, kind: type = float) -> Any:
    if text is None or isinstance(text, (int, float)):
        return text
    try:
        return kind(text)
    except ValueError:
        _checks.refuse(name, text, "a whole number" if kind is int else "a number")


def _widths(text: str | None) -> list[int] | None:
    if text is None:
        return None
    return [_number("widths", part, int) for part in text.split("-")]


def _layer_density(text: str | None, layers: list[str]) -> dict[str, float] | None:
    """`NAME=D,NAME=D`, or one number for each of `layers`."""
    if text is None:
        return None
    if "=" not in text:
        density: float = _number("layer_density", text)
        return dict.fromkeys(layers, density)
    targets: dict[str, float] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name or name in targets:
            _checks.refuse("layer_density", text, "NAME=DENSITY,... with each name once")
        targets[name] = _number(f"layer_density[{name}]", value)
    return targets


def _settings(args: argparse.Namespace, layers: list[str]) -> TrainerSettings:
    chosen: dict[str, Any] = dict(DATASET_SETTINGS[args.dataset])
    if args.recipe == "published":
        chosen.update(models.PUBLISHED_SETTINGS)
    for name in ("epochs", "batch_size", "lr", "gate_lr", "dual_lr", "weight_decay"):
        kind = int if name in ("epochs", "batch_size") else float
        value = _number(name, getattr(args, name), kind)
        if value is not None:
            chosen[name] = value
    density = _number("density", args.density)
    layer_density = _layer_density(args.layer_density, layers)
    penalty = _number("penalty", args.penalty)
    if args.dense and (density, layer_density, penalty) != (None, None, None):
        _checks.refuse("dense", True, "no --density, --layer-density or --penalty beside it")
    if not args.dense and density is layer_density is penalty is None:
        _checks.refuse("density", None, "--density, --layer-density, --penalty or --dense")
    return TrainerSettings(
        density=density,
        layer_density=layer_density,
        measure=args.measure,
        penalty=penalty,
        penalty_per_example=args.penalty_per_example,
        seed=_number("seed", args.seed, int),
        restarts=not args.no_restarts,
        skip=SKIP[args.skip],
        **chosen,
    )


def _default_out(args: argparse.Namespace, settings: TrainerSettings) -> Path:
    kind = "dense"
    if settings.penalty is not None:
        kind = f"penalty-{args.penalty}"
    elif settings.gated:
        measure = "density" if settings.measure == "gates" else settings.measure
        kind = f"{measure}-{args.density or args.layer_density}"
    model = args.model.replace(":", ".")
    return Path("runs") / f"{args.dataset}-{model}-{kind}-seed-{settings.seed}"


def _progress(settings: TrainerSettings, done: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=settings.epochs, initial=done, disable=quiet, unit="epoch", dynamic_ncols=True
    )


def _collapse(layers: list[str], trainer: Trainer) -> str:
    """That nothing passes through those layers, and what may help."""
    remedy = "a smaller --penalty"
    if isinstance(trainer.term, DensityConstraint):
        rate = f"{float(trainer.term.dual_lr):.3g}"
        remedy = f"a higher density, a smaller --dual-lr (it is {rate}) or more --epochs"
    names = ", ".join(layers)
    return f"collapsed: all gates of {names} are closed, nothing passes through; try {remedy}"


def _run(trainer: Trainer, resume: bool, quiet: bool) -> dict[str, Any]:
    trainer.open(resume)
    told = False
    with _progress(trainer.settings, trainer.epoch, quiet) as bar:

        def on_epoch(row: dict[str, Any]) -> None:
            nonlocal told
            if row.get("collapsed") and not told:
                line = f"epoch {row['epoch']}: {_collapse(row['collapsed'], trainer)}"
                bar.write(line, file=sys.stderr)
                told = True
            words = [f"loss {row['loss']:.4f}", f"test error {row['test_error_percent']:.2f}%"]
            if "expected_density" in row:
                words.append(f"density {row['expected_density']:.4f}")
            if "lambda" in row:
                lambdas = " ".join(f"{value:.3g}" for value in row["lambda"].values())
                words.append(f"lambda {lambdas}")
            bar.set_postfix_str(", ".join(words), refresh=False)
            bar.update()

        return trainer.fit(on_epoch=on_epoch)


def train(args: argparse.Namespace) -> int:
    """Trains, prunes, writes all into --out, and says what it came to."""
    _checks.one_of("recipe", args.recipe, RECIPES)
    _checks.one_of("skip", args.skip, tuple(SKIP))
    _checks.one_of("dataset", args.dataset, data.DATASETS)
    in_colour = models.from_torchvision(args.model)
    if args.threads is not None:
        torch.set_num_threads(_checks.whole("threads", _number("threads", args.threads, int)))
    # Moments of closed gates' weights decay into denormals, which CPUs add very slowly.
    torch.set_flush_denormal(True)
    seed = _checks.whole("seed", _number("seed", args.seed, int), 0, MAX_SEED)
    published = args.recipe == "published"
    fraction = _number("validation_fraction", args.validation_fraction)
    if fraction is None:
        fraction = 0.0 if published else 1 / 12
    if args.pretrained is not None and published:
        _checks.refuse("pretrained", args.pretrained, "none: --recipe published initialises anew")
    image_size = _number("image_size", args.image_size, int)
    dataset = data.load(args.dataset, args.data_root, fraction, seed, image_size)
    if in_colour:
        dataset = data.in_colour(dataset)
    in_shape = tuple(dataset.train.inputs.shape[1:])
    widths = _widths(args.widths)
    if args.model in models.WIDTHS:
        widths = widths or list(models.WIDTHS[args.model])

    def build(gated: bool) -> nn.Module:
        torch.manual_seed(seed)
        dense = models.build(args.model, in_shape, dataset.num_classes, widths)
        if args.pretrained is not None:
            models.load_pretrained_(dense, Path(args.pretrained))
        if gated and published:
            models.sparsify_published_(dense, example, SKIP[args.skip])
        return dense

    example = dataset.train.inputs[:1]
    layers: list[str] = []
    if args.layer_density is not None:  # a single number stands for each of them
        layers = list(gated_layers(sparsify_(build(False), example_inputs=example)))
    settings = _settings(args, layers)
    identity: dict[str, Any] = {
        "dataset": args.dataset,
        "model": args.model,
        "widths": widths,
        "recipe": args.recipe,
        "validation_fraction": fraction,
        "pretrained": args.pretrained,
    }
    if args.dataset not in data.FIXED:
        identity |= {"in_shape": list(in_shape), "num_classes": dataset.num_classes}
    out = Path(args.out) if args.out else _default_out(args, settings)
    options: dict[str, Any] = {"identity": identity, "device": args.device}
    trainer = Trainer(build(settings.gated), dataset, settings, out=out, **options)
    summary = _run(trainer, args.resume, args.quiet)
    if args.compare_dense and settings.gated:
        dense_settings = replace(
            settings,
            density=None,
            layer_density=None,
            measure=TrainerSettings.measure,
            penalty=None,
        )
        baseline = Trainer(build(False), dataset, dense_settings, out=out / "dense", **options)
        error = _run(baseline, (out / "dense" / CHECKPOINT).exists(), args.quiet)
        summary["dense_test_error_percent"] = error["test_error_percent"]
        summary["dense_seconds"] = error["seconds"]
        trainer.write_summary(summary)
    _result(summary, out, trainer)
    return 0


def _result(summary: dict[str, Any], out: Path, trainer: Trainer) -> None:
    """What the run came to, on standard output."""
    error = f"{summary['test_error_percent']:.2f} %"
    dense = summary.get("dense_test_error_percent")
    if trainer.pruned is None:
        print(f"dense model: test error {error}, {summary['params']:,} parameters")
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
            print(_collapse(summary["collapsed"], trainer))
        beside = "" if dense is None else f" (dense: {dense:.2f} %)"
        print(f"pruned model {summary['architecture']}: test error {error}{beside}")
        for unit in ("params", "macs"):
            small, full = summary[unit], summary[f"dense_{unit}"]
            print(f"  {unit:<6} {small:>9,} of {full:>9,} ({100 * small / full:.1f} %)")
        print(f"  saved  {out / PRUNED}")
    print(f"  plot   {out / PLOT}\n  all    {out / SUMMARY}, {out / METRICS}")


# --- prune and report ----------------------------------------------------------------------------


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
    _checks.one_of("dataset", dataset, data.DATASETS)
    in_shape, num_classes = data.FIXED.get(dataset) or (
        identity["in_shape"],
        identity["num_classes"],
    )
    if models.from_torchvision(name):
        in_shape = (data.COLOURS, *in_shape[1:])
    model = models.build(name, in_shape, num_classes, identity["widths"])
    example = torch.zeros(1, *in_shape)
    if identity["recipe"] == "published":
        models.sparsify_published_(model, example, False)
    else:
        sparsify_(model, example_inputs=example, skip=False)
    checkpoint.refuse_other(path, identity, model)
    model.load_state_dict(checkpoint.model)
    return checkpoint, model, example


def _pruned(
    checkpoint: Checkpoint, model: nn.Module, example: Tensor, target: str | None
) -> nn.Module:
    """The smaller model, within `target` (by the run's measure) or else what the run asked for."""
    measure = checkpoint.identity.get("measure", "gates")
    if target is not None:
        wanted = _layer_density(target, []) if "=" in target else _number("target", target)
        return prune_model(model, example, wanted, measure=measure)
    asked: float | Mapping[str, float] | None = (
        checkpoint.identity["density"] or checkpoint.identity["layer_density"]
    )
    if asked is not None:
        # It leaves its targets on the model.
        DensityConstraint(model, asked, measure=measure, example_inputs=example)
    return prune_model(model, example)


def prune(args: argparse.Namespace) -> int:
    """Writes the smaller model of a checkpoint, and says what it came to."""
    path = Path(args.checkpoint)
    out = path.with_name(PRUNED) if args.out is None else Path(args.out)
    if out.exists() and not args.force:
        _checks.refuse("out", str(out), "a file that is not there yet (--force replaces it)")
    small = _pruned(*_rebuilt(path), args.target)
    save_pruned(small, out)
    print(format_report(small.report))  # type: ignore[arg-type]
    print(f"saved {out}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Says what is gated in a checkpoint, how dense it is, and what pruning would remove."""
    checkpoint, model, example = _rebuilt(Path(args.checkpoint))
    table = density(model, example)
    small = _pruned(checkpoint, model, example, args.target)
    identity = checkpoint.identity
    done = f"epoch {checkpoint.epoch} of {identity['epochs']}"
    print(f"{identity['model']} on {identity['dataset']}, {done}; gates:\n\n{table}")
    print(f"\npruned, it would be:\n\n{format_report(small.report)}")  # type: ignore[arg-type]
    return 0
