"""The words of the command that say what to train, and what they mean."""

from __future__ import annotations

import argparse
from typing import Any

from l0fast import _checks
from l0fast.data import sets
from l0fast.data.formats import DATA_ROOT_VARIABLE
from l0fast.measures.amounts import Asked
from l0fast.training import models
from l0fast.training.settings import TrainerSettings

DEFAULTS = TrainerSettings()
RECIPES = ("default", "published")
SWITCH: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"epochs": 30, "batch_size": 128, "lr": 1e-3} for name in sets.DATASETS},
    "digits": {"epochs": 100, "batch_size": 64, "lr": 3e-3},
}
"""Defaults that go with the size of a data set."""


def add_training(parser: argparse.ArgumentParser) -> None:
    """The options of a training."""
    add = parser.add_argument
    add("--dataset", default="digits", help=f"{', '.join(sets.DATASETS)}; default: digits")
    add(
        "--model",
        default="mlp",
        help="mlp (the default), lenet5, a torchvision model such as resnet18, or "
        "package.module:callable, which builds one",
    )
    add("--widths", metavar="N-N-...", help="hidden sizes, such as 300-100 (mlp) or 20-50-500")
    add(
        "--pretrained",
        metavar="FILE",
        help="start from the state dict in a .safetensors file, or in one of torch.save's",
    )
    add(
        "--density",
        metavar="D",
        help="target of the whole model: a density in (0, 1], or an amount, such as '100k params'; "
        "D,D,... one after the other, falling",
    )
    add(
        "--layer-density",
        metavar="NAME=D,...",
        help="a target for each layer (or pattern), such as 'conv*=0.5,fc1=0.1'; "
        "a single number stands for each layer",
    )
    add(
        "--measure",
        default=DEFAULTS.measure,
        help="what targets are shares or amounts of: gates (the default), or params, macs, memory "
        "(of activations) or latency (on this device) of the pruned model",
    )
    add(
        "--latency-table",
        metavar="FILE",
        help="latencies of this model that were measured before, perhaps on another device; "
        "default: they are measured here, and a resumed run goes by the first",
    )
    add(
        "--method",
        default=DEFAULTS.method,
        help="how the density is met: l0 (the default), or by the baselines magnitude, which is "
        "gradual, and magnitude-one-shot",
    )
    add(
        "--gates",
        default=DEFAULTS.gates,
        help="where gates sit: auto (the default), input, output, or weight for single weights",
    )
    add("--penalty", metavar="C", help="coefficient of the penalised method instead of a target")
    add(
        "--penalty-per-example",
        action="store_true",
        help="--penalty in the unit of Louizos et al.: C / examples x expected L0",
    )
    add("--dense", action="store_true", help="no gates: train the dense baseline")
    add("--epochs", metavar="N", help="default: 100 for digits, else 30")
    add("--seed", default=DEFAULTS.seed, metavar="N")
    add("--batch-size", metavar="N", help="default: 64 for digits, else 128")
    add("--lr", metavar="LR", help="learning rate of the weights")
    add("--gate-lr", metavar="LR", help="learning rate of the gates")
    add("--dual-lr", metavar="LR", help="learning rate of the multipliers; default: by the steps")
    add(
        "--dual",
        default=DEFAULTS.dual,
        help="how the multipliers move: ascent (the default), pi, augmented or equality",
    )
    add("--dual-first", action="store_true", help="move them before the loss, not after the step")
    add(
        "--target-schedule",
        help="how targets come down to what is asked: cubic (the default), linear, or constant (in "
        "force from the start, as in the published recipe)",
    )
    add("--target-warmup", metavar="F", help="the share of the training that takes; default: 0.5")
    add(
        "--settle",
        metavar="F",
        help="the share of the epochs at the end in which the gates are decided, and trained on "
        f"without noise; default: {DEFAULTS.settle:g}; 0: none",
    )
    add(
        "--augment",
        default=DEFAULTS.augment,
        help="what is done to training images at random: none (the default), crop (shifts by up to "
        "an eighth of a side) or crop-flip (mirror images, too)",
    )
    add("--weight-decay", metavar="W", help="decoupled, of the weights")
    add("--no-restarts", action="store_true", help="no dual restarts")
    add(
        "--recipe",
        default="default",
        help="default, or published: the settings of the 2021 paper (constant learning rates, "
        "droprate initialisation, log_alpha within log(100), no validation split)",
    )
    add(
        "--select",
        default=DEFAULTS.select,
        help="the epoch whose model is pruned: last, or best (the least validation error once the "
        "gates have settled; with --settle 0, where the evaluation gates meet the target)",
    )
    add(
        "--shrink",
        metavar="N",
        help="remove for good, during training, gates that have seldom been open for N epochs",
    )
    add("--validation-fraction", metavar="F", help="held out from the training examples")
    add(
        "--data-root",
        metavar="DIR",
        help="torchvision data, or an imagefolder with train/ and val/ (or test/); default: "
        f"{DATA_ROOT_VARIABLE}",
    )
    add(
        "--image-size",
        metavar="N",
        help="resize and crop the images of an imagefolder to N x N; default: as they are",
    )
    add("--out", metavar="DIR", help="folder of this run; default: runs/DATASET-MODEL-...-SEED")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--compare-dense", action="store_true", help="also train the dense model, into OUT/dense")
    add(
        "--skip",
        default="auto",
        help="leave closed units out of a training step: auto (where it pays), on or off",
    )
    add(
        "--cuda-graph",
        default="auto",
        help="take a step as one CUDA graph: auto (where it can be), on or off",
    )
    add("--threads", metavar="N", help="CPU threads")
    add("--device", help="cpu, cuda, ...; default: cuda if there is one")
    add("--quiet", action="store_true", help="no progress bar")


def check(args: argparse.Namespace) -> None:
    """Refuses words that are none of their choices."""
    _checks.one_of("recipe", args.recipe, RECIPES)
    _checks.one_of("skip", args.skip, tuple(SWITCH))
    _checks.one_of("cuda_graph", args.cuda_graph, tuple(SWITCH))
    _checks.one_of("dataset", args.dataset, sets.DATASETS)
    if args.latency_table is not None and args.measure != "latency":
        _checks.refuse("latency_table", args.latency_table, "--measure latency beside it")


def number(name: str, text: Any, kind: type = float) -> Any:
    """What a word says as a number; None and numbers stay as they are."""
    if text is None or isinstance(text, (int, float)):
        return text
    try:
        return kind(text)
    except ValueError:
        _checks.refuse(name, text, "a whole number" if kind is int else "a number")


def widths(text: str | None) -> list[int] | None:
    """`N-N-...`."""
    if text is None:
        return None
    return [number("widths", part, int) for part in text.split("-")]


def validation_fraction(args: argparse.Namespace) -> float:
    """What is held out: as named; else a twelfth, and nothing in the published recipe."""
    fraction: float | None = number("validation_fraction", args.validation_fraction)
    if fraction is None:
        fraction = 0.0 if args.recipe == "published" else 1 / 12
    return fraction


def default_widths(model: str) -> list[int] | None:
    """Those of the hidden layers of a model that has widths."""
    return list(models.WIDTHS[model]) if model in models.WIDTHS else None


def target(text: str) -> Asked:
    """A density, where a word says a number; else the word, which may name an amount."""
    try:
        return float(text)
    except ValueError:
        return text


def layer_densities(text: str | None, layers: list[str]) -> dict[str, Asked] | None:
    """`NAME=D,NAME=D`, or one number for each of `layers`."""
    if text is None:
        return None
    if "=" not in text:
        return dict.fromkeys(layers, target(text))
    targets: dict[str, Asked] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not name or name in targets:
            _checks.refuse("layer_density", text, "NAME=DENSITY,... with each name once")
        targets[name] = target(value)
    return targets


def settings(args: argparse.Namespace, layers: list[str]) -> TrainerSettings:
    """How to train, by the words of the command; `layers` as in `layer_densities`."""
    chosen: dict[str, Any] = dict(DATASET_SETTINGS[args.dataset])
    if args.recipe == "published":
        chosen.update(models.PUBLISHED_SETTINGS)
    numbers = (
        *("epochs", "batch_size", "lr", "gate_lr", "dual_lr"),
        *("target_warmup", "settle", "weight_decay"),
    )
    for name in numbers:
        kind = int if name in ("epochs", "batch_size") else float
        value = number(name, getattr(args, name), kind)
        if value is not None:
            chosen[name] = value
    if args.target_schedule is not None:
        chosen["target_schedule"] = args.target_schedule
    density = None if args.density is None else target(args.density)
    layer_density = layer_densities(args.layer_density, layers)
    penalty = number("penalty", args.penalty)
    if args.dense and (density, layer_density, penalty) != (None, None, None):
        _checks.refuse("dense", True, "no --density, --layer-density or --penalty beside it")
    if not args.dense and density is layer_density is penalty is None:
        _checks.refuse("density", None, "--density, --layer-density, --penalty or --dense")
    return TrainerSettings(
        density=density,
        layer_density=layer_density,
        measure=args.measure,
        method=args.method,
        gates=args.gates,
        penalty=penalty,
        penalty_per_example=args.penalty_per_example,
        seed=number("seed", args.seed, int),
        restarts=not args.no_restarts,
        select=args.select,
        augment=args.augment,
        dual=args.dual,
        dual_first=args.dual_first,
        skip=SWITCH[args.skip],
        cuda_graph=SWITCH[args.cuda_graph],
        shrink=number("shrink", args.shrink, int),
        **chosen,
    )
