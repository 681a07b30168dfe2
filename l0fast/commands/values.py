"""Turns the values of a training's options into settings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from l0fast import _checks
from l0fast.data import arrays, imagefolder, sets
from l0fast.data.arrays import SUFFIXES
from l0fast.measures.amounts import Asked
from l0fast.training import models
from l0fast.training.settings import KINDS as TASKS
from l0fast.training.settings import TrainerSettings

RECIPES = ("default", "published")
SWITCH: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}
DATASET_SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"epochs": 30, "batch_size": 128, "lr": 1e-3} for name in sets.KINDS},
    "digits": {"epochs": 100, "batch_size": 64, "lr": 3e-3},
}
"""Defaults by data set."""


def check(args: argparse.Namespace) -> None:
    """Refuses values that are not among the choices of their option."""
    _checks.one_of("recipe", args.recipe, RECIPES)
    _checks.one_of("skip", args.skip, tuple(SWITCH))
    _checks.one_of("cuda_graph", args.cuda_graph, tuple(SWITCH))
    dataset(args)
    models.from_torchvision(args.model)
    if args.task is not None:
        _checks.one_of("task", args.task, TASKS)
    if args.latency_table is not None and args.measure != "latency":
        _checks.refuse("latency_table", args.latency_table, "--measure latency beside it")


def dataset(args: argparse.Namespace) -> tuple[str, str | None]:
    """(kind of data set, its root). --dataset may also be the path of a folder of images, or of a
    file of arrays."""
    named = args.dataset
    kind = sets.IMAGES if Path(named).is_dir() else sets.ARRAYS
    if named in sets.DATASETS:
        return named, args.data_root
    if kind == sets.ARRAYS and not named.endswith(SUFFIXES):
        known = ", ".join(map(repr, sets.DATASETS))
        _checks.refuse("dataset", named, f"one of {known}, a folder of images, or a .npz or .pt")
    if args.data_root is not None:
        _checks.refuse(
            "data_root", args.data_root, f"no --data-root: --dataset {named} is a path already"
        )
    return kind, named


def number(name: str, text: Any, kind: type = float) -> Any:
    """The number in `text`; None and numbers stay as they are."""
    if text is None or isinstance(text, (int, float)):
        return text
    try:
        return kind(text)
    except ValueError:
        _checks.refuse(name, text, "a whole number" if kind is int else "a number")


def widths(text: str | None) -> list[int] | None:
    """The numbers of `N-N-...`."""
    if text is None:
        return None
    return [number("widths", part, int) for part in text.split("-")]


def validation_fraction(args: argparse.Namespace) -> float:
    """The share of the training examples to hold out. The default is 1/12; it is 0 in the published
    recipe, and for a folder of images that has a validation part."""
    fraction: float | None = number("validation_fraction", args.validation_fraction)
    if fraction is None:
        kind, root = dataset(args)
        apart = kind == sets.IMAGES and imagefolder.has_validation(root)
        fraction = 0.0 if args.recipe == "published" or apart else 1 / 12
    return fraction


def digest(args: argparse.Namespace) -> str | None:
    """A digest that tells the user's own data from other data of the same shapes; None for a data
    set that the command knows."""
    kind, root = dataset(args)
    if kind == sets.ARRAYS:
        return arrays.digest(args.dataset)
    return imagefolder.digest(root) if kind == sets.IMAGES else None


def default_widths(model: str) -> list[int] | None:
    """The default hidden sizes of a model; None if it takes no `--widths`."""
    return list(models.WIDTHS[model]) if model in models.WIDTHS else None


def target(text: str) -> Asked:
    """The density, if `text` is a number; else `text` itself, which may be an amount."""
    try:
        return float(text)
    except ValueError:
        return text


def layer_densities(text: str | None, layers: list[str]) -> dict[str, Asked] | None:
    """The targets of `NAME=D,NAME=D`, or one target for each of `layers`."""
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


def chosen_numbers(args: argparse.Namespace) -> dict[str, Any]:
    """The numeric settings that the options name, or that the data set or the recipe has."""
    chosen: dict[str, Any] = dict(DATASET_SETTINGS[dataset(args)[0]])
    if args.recipe == "published":
        chosen.update(models.PUBLISHED_SETTINGS)
    numbers = (
        *("epochs", "batch_size", "lr", "gate_lr", "dual_lr"),
        *("start", "target_warmup", "settle", "weight_decay"),
        *("accumulate", "clip_grad_norm", "warmup", "ema"),
    )
    for name in numbers:
        kind = int if name in ("epochs", "batch_size", "accumulate") else float
        value = number(name, getattr(args, name), kind)
        if value is not None:
            chosen[name] = value
    return chosen


def asked(args: argparse.Namespace) -> TrainerSettings:
    """The settings as far as the words alone say them: before data and model are there.

    Raises:
        ValueError, TypeError: words that no data and no model could make right.
    """
    check(args)
    every_layer = ["*"]  # a single number is the target of each
    return settings(args, every_layer, args.task or sets.CLASSES)


def settings(args: argparse.Namespace, layers: list[str], task: str) -> TrainerSettings:
    """The settings that the options ask for; `layers` as in `layer_densities`, `task` of the
    data."""
    chosen = chosen_numbers(args)
    if args.target_schedule is not None:
        chosen["target_schedule"] = args.target_schedule
    density = None if args.density is None else target(args.density)
    layer_density = layer_densities(args.layer_density, layers)
    penalty = number("penalty", args.penalty)
    if args.dense and (density, layer_density, penalty) != (None, None, None):
        _checks.refuse("dense", True, "no --density, --layer-density or --penalty with it")
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
        # A folder of images is augmented when it is loaded.
        precision=args.precision,
        compile=args.compile,
        augment="none" if dataset(args)[0] == sets.IMAGES else args.augment,
        task=task,
        dual=args.dual,
        dual_first=args.dual_first,
        skip=SWITCH[args.skip],
        cuda_graph=SWITCH[args.cuda_graph],
        shrink=number("shrink", args.shrink, int),
        **chosen,
    )
