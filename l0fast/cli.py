"""The command: `l0fast train`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from l0fast import _checks, data, models
from l0fast.trainer import (
    CHECKPOINT,
    MAX_SEED,
    METRICS,
    PLOT,
    PRUNED,
    SUMMARY,
    Trainer,
    TrainerSettings,
)

DEFAULTS = TrainerSettings()
RECIPES = ("default", "published")
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"epochs": 100, "batch_size": 64, "lr": 3e-3},
    "mnist": {"epochs": 30, "batch_size": 128, "lr": 1e-3},
}
"""Defaults that go with the size of a data set."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="l0fast", description="Constrained L0 sparsity for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model to a density and prune it",
        description="Trains a model to the density asked for, prunes it, and writes into --out: "
        "summary.json, metrics.jsonl, dynamics.png, checkpoint.pt, pruned.safetensors.",
    )
    add = train.add_argument
    add("--dataset", default="digits", help="digits (embedded, the default) or mnist")
    add("--model", default="mlp", help="mlp (the default) or lenet5")
    add("--widths", metavar="N-N-...", help="hidden sizes, such as 300-100 (mlp) or 20-50-500")
    add("--density", metavar="D", help="target density of the whole model, in (0, 1]")
    add(
        "--layer-density",
        metavar="NAME=D,...",
        help="a target for each layer (or pattern), such as 'conv*=0.5,fc1=0.1'; "
        "a single number stands for each layer",
    )
    add(
        "--measure",
        default=DEFAULTS.measure,
        help="what densities are shares of: gates (the "
        "default), or params or macs of the pruned model",
    )
    add("--penalty", metavar="C", help="coefficient of the penalised method instead of a target")
    add(
        "--penalty-per-example",
        action="store_true",
        help="--penalty in the unit of Louizos et al.: C / examples x expected L0",
    )
    add("--dense", action="store_true", help="no gates: train the dense baseline")
    add("--epochs", metavar="N", help="default: 100 for digits, 30 for mnist")
    add("--seed", default=DEFAULTS.seed, metavar="N")
    add("--batch-size", metavar="N", help="default: 64 for digits, 128 for mnist")
    add("--lr", metavar="LR", help="learning rate of the weights")
    add("--gate-lr", metavar="LR", help="learning rate of the gates")
    add("--dual-lr", metavar="LR", help="learning rate of the multipliers; default: by the steps")
    add("--weight-decay", metavar="W", help="decoupled, of the weights")
    add("--no-restarts", action="store_true", help="no dual restarts")
    add(
        "--recipe",
        default="default",
        help="default, or published: the settings of the 2021 paper (constant learning rates, "
        "droprate initialisation, log_alpha within log(100), no validation split)",
    )
    add("--validation-fraction", metavar="F", help="held out from the training examples")
    add("--data-root", metavar="DIR", help=f"torchvision data; default: {data.DATA_ROOT_VARIABLE}")
    add("--out", metavar="DIR", help="folder of this run; default: runs/DATASET-MODEL-...-SEED")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--compare-dense", action="store_true", help="also train the dense model, into OUT/dense")
    add("--threads", metavar="N", help="CPU threads")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--quiet", action="store_true", help="no progress bar")
    return parser


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
        **chosen,
    )


def _default_out(args: argparse.Namespace, settings: TrainerSettings) -> Path:
    kind = "dense"
    if settings.penalty is not None:
        kind = f"penalty-{args.penalty}"
    elif settings.gated:
        measure = "density" if settings.measure == "gates" else settings.measure
        kind = f"{measure}-{args.density or args.layer_density}"
    return Path("runs") / f"{args.dataset}-{args.model}-{kind}-seed-{settings.seed}"


def _progress(settings: TrainerSettings, done: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=settings.epochs, initial=done, disable=quiet, unit="epoch", dynamic_ncols=True
    )


def _run(trainer: Trainer, resume: bool, quiet: bool) -> dict[str, Any]:
    trainer.open(resume)
    with _progress(trainer.settings, trainer.epoch, quiet) as bar:

        def on_epoch(row: dict[str, Any]) -> None:
            words = [f"loss {row['loss']:.4f}", f"test error {row['test_error_percent']:.2f}%"]
            if "expected_density" in row:
                words.append(f"density {row['expected_density']:.4f}")
            if "lambda" in row:
                lambdas = " ".join(f"{value:.3g}" for value in row["lambda"].values())
                words.append(f"lambda {lambdas}")
            bar.set_postfix_str(", ".join(words), refresh=False)
            bar.update()

        return trainer.fit(on_epoch=on_epoch)


def _train(args: argparse.Namespace) -> int:
    _checks.one_of("recipe", args.recipe, RECIPES)
    _checks.one_of("model", args.model, models.MODELS)
    _checks.one_of("dataset", args.dataset, data.DATASETS)
    if args.threads is not None:
        torch.set_num_threads(_checks.whole("threads", _number("threads", args.threads, int)))
    # Moments of closed gates' weights decay into denormals, which CPUs add very slowly.
    torch.set_flush_denormal(True)
    seed = _checks.whole("seed", _number("seed", args.seed, int), 0, MAX_SEED)
    published = args.recipe == "published"
    fraction = _number("validation_fraction", args.validation_fraction)
    if fraction is None:
        fraction = 0.0 if published else 1 / 12
    dataset = data.load(args.dataset, args.data_root, fraction, seed)
    in_shape = tuple(dataset.train.inputs.shape[1:])
    widths = _widths(args.widths) or list(models.WIDTHS[args.model])

    def build(gated: bool) -> torch.nn.Module:
        torch.manual_seed(seed)
        dense = models.build(args.model, in_shape, dataset.num_classes, widths)
        return models.sparsify_published_(dense) if gated and published else dense

    dense = build(False)
    layers = [name for name, layer in dense.named_modules() if list(layer.parameters(False))]
    settings = _settings(args, layers)
    identity = {
        "dataset": args.dataset,
        "model": args.model,
        "widths": widths,
        "recipe": args.recipe,
        "validation_fraction": fraction,
    }
    out = Path(args.out) if args.out else _default_out(args, settings)
    options: dict[str, Any] = {"identity": identity, "device": args.device}
    trainer = Trainer(build(settings.gated), dataset, settings, out=out, **options)
    summary = _run(trainer, args.resume, args.quiet)
    if args.compare_dense and settings.gated:
        dense_settings = replace(
            settings, density=None, layer_density=None, measure=DEFAULTS.measure, penalty=None
        )
        baseline = Trainer(build(False), dataset, dense_settings, out=out / "dense", **options)
        error = _run(baseline, (out / "dense" / CHECKPOINT).exists(), args.quiet)
        summary["dense_test_error_percent"] = error["test_error_percent"]
        summary["dense_seconds"] = error["seconds"]
        trainer.write_summary(summary)
    _report(summary, out, trainer)
    return 0


def _report(summary: dict[str, Any], out: Path, trainer: Trainer) -> None:
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
        beside = "" if dense is None else f" (dense: {dense:.2f} %)"
        print(f"pruned model {summary['architecture']}: test error {error}{beside}")
        for unit in ("params", "macs"):
            small, full = summary[unit], summary[f"dense_{unit}"]
            print(f"  {unit:<6} {small:>9,} of {full:>9,} ({100 * small / full:.1f} %)")
        print(f"  saved  {out / PRUNED}")
    print(f"  plot   {out / PLOT}\n  all    {out / SUMMARY}, {out / METRICS}")


def main(argv: list[str] | None = None) -> int:
    """The entry point: 0 on success, 2 with one line on stderr for bad input."""
    args = _parser().parse_args(argv)
    try:
        return _train(args)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"l0fast {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("l0fast: interrupted; --resume goes on from the last epoch", file=sys.stderr)
        return 130
