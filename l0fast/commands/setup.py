"""From the words of the command to a model, its data and how to train it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast._extras import require
from l0fast.commands import values
from l0fast.data import sets
from l0fast.data.sets import Data
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.measures.latency import LatencyTable
from l0fast.training import models
from l0fast.training.settings import MAX_SEED, TrainerSettings
from l0fast.training.trainer import Trainer

MAX_THREADS = 2**16


@dataclass(frozen=True)
class Setup:
    """What the command was asked to train."""

    args: argparse.Namespace
    data: Data
    widths: list[int] | None
    seed: int
    validation_fraction: float
    table: LatencyTable | None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.data.train.inputs.shape[1:])

    @property
    def identity(self) -> dict[str, Any]:
        """Facts about model and data, see `Trainer`."""
        args = self.args
        identity: dict[str, Any] = {
            "dataset": args.dataset,
            "model": args.model,
            "widths": self.widths,
            "recipe": args.recipe,
            "validation_fraction": self.validation_fraction,
            "pretrained": args.pretrained,
        }
        if args.dataset not in sets.FIXED:
            identity |= {"in_shape": list(self.in_shape), "num_classes": self.data.num_classes}
        return identity

    def build(self, gated: bool) -> nn.Module:
        """The model, from the seed anew; only the published recipe puts gates in here."""
        args = self.args
        torch.manual_seed(self.seed)
        model = models.build(args.model, self.in_shape, self.data.num_classes, self.widths)
        if args.pretrained is not None:
            models.load_pretrained_(model, Path(args.pretrained))
        if gated and args.recipe == "published":
            example = self.data.train.inputs[:1]
            models.sparsify_published_(model, example, values.SWITCH[args.skip])
        return model

    def settings(self) -> TrainerSettings:
        """How to train."""
        layers: list[str] = []
        if self.args.layer_density is not None:  # a single number stands for each of them
            example = self.data.train.inputs[:1]
            layers = list(
                gated_layers(
                    sparsify_(self.build(False), gates=self.args.gates, example_inputs=example)
                )
            )
        return values.settings(self.args, layers)

    def trainer(self, settings: TrainerSettings, out: Path) -> Trainer:
        """A new trainer, which has written nothing yet."""
        return Trainer(
            self.build(settings.gated),
            self.data,
            settings,
            out=out,
            identity=self.identity,
            device=self.args.device,
            table=self.table if settings.gated else None,
        )


def set_up(args: argparse.Namespace) -> Setup:
    """Checks the words, loads the data, and sets the process up for training.

    Raises:
        ValueError, TypeError: a word that stands for nothing.
    """
    values.check(args)
    require("train", "matplotlib", "tqdm", *(["sklearn"] if args.dataset == "digits" else []))
    in_colour = models.from_torchvision(args.model)
    if args.threads is not None:
        threads = _checks.whole(
            "threads", values.number("threads", args.threads, int), 1, MAX_THREADS
        )
        torch.set_num_threads(threads)
    # Moments of closed gates' weights decay into denormals, which CPUs add very slowly.
    torch.set_flush_denormal(True)
    seed = _checks.whole("seed", values.number("seed", args.seed, int), 0, MAX_SEED)
    fraction = values.validation_fraction(args)
    if args.pretrained is not None and args.recipe == "published":
        _checks.refuse("pretrained", args.pretrained, "none: --recipe published initialises anew")
    path = args.latency_table
    table = None if path is None else LatencyTable.load(path, "latency_table")
    image_size = values.number("image_size", args.image_size, int)
    dataset = sets.load(args.dataset, args.data_root, fraction, seed, image_size)
    if in_colour:
        dataset = sets.in_colour(dataset)
    widths = values.widths(args.widths) or values.default_widths(args.model)
    return Setup(args, dataset, widths, seed, fraction, table)
