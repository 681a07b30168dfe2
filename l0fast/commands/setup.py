"""Makes the model, the data and the settings that the options of the command ask for."""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast._extras import require
from l0fast.commands import values
from l0fast.data import sets
from l0fast.data.imagefolder import Loading
from l0fast.data.sets import Data
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.measures.latency import LatencyTable
from l0fast.training import models
from l0fast.training.ranks import Ranks
from l0fast.training.settings import MAX_SEED, TrainerSettings
from l0fast.training.trainer import Trainer

MAX_THREADS = 2**16
MAX_WORKERS = 2**10
AUGMENT = "image_augment"
"""The name, in the identity of a run, of the random changes of streamed images."""


@dataclass(frozen=True)
class Setup:
    """What the command was asked to train."""

    args: argparse.Namespace
    dataset: str
    data: Data
    loading: Loading
    widths: list[int] | None
    seed: int
    validation_fraction: float
    table: LatencyTable | None

    @property
    def in_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.example.shape[1:])

    @property
    def identity(self) -> dict[str, Any]:
        """Facts about model and data, see `Trainer`."""
        args = self.args
        identity: dict[str, Any] = {
            "dataset": self.dataset,
            "model": args.model,
            "widths": self.widths,
            "recipe": args.recipe,
            "validation_fraction": self.validation_fraction,
            "pretrained": args.pretrained,
        }
        if self.dataset not in sets.FIXED:
            identity |= {"in_shape": list(self.in_shape), "num_classes": self.data.num_classes}
            identity["digest"] = self.digest
        if self.dataset == sets.IMAGES:
            identity |= {"image_size": self.loading.image_size, AUGMENT: args.augment}
        return identity

    @cached_property
    def digest(self) -> str | None:
        """As `values.digest`; computed once, as it may read much."""
        return values.digest(self.args)

    @cached_property
    def example(self) -> Tensor:
        """[1, ...]: an example of the model's input."""
        return sets.example_of(self.data)

    def build(self, gated: bool) -> nn.Module:
        """Builds the model from the seed; puts gates in only for the published recipe."""
        args = self.args
        for begin in (torch.manual_seed, random.seed, np.random.seed):
            begin(self.seed)
        outputs = self.data.num_classes
        assert outputs is not None
        model = models.build(args.model, self.in_shape, outputs, self.widths)
        if args.pretrained is not None:
            models.load_pretrained_(model, Path(args.pretrained))
        if gated and args.recipe == "published":
            models.sparsify_published_(model, self.example, values.SWITCH[args.skip])
        return model

    def settings(self) -> TrainerSettings:
        """The settings of the training."""
        layers: list[str] = []
        if self.args.layer_density is not None:  # a single number is the target of each of them
            where, example = self.args.gates, self.example
            layers = list(
                gated_layers(sparsify_(self.build(False), gates=where, example_inputs=example))
            )
        return values.settings(self.args, layers, self.data.task)

    def trainer(self, settings: TrainerSettings, out: Path) -> Trainer:
        """A new trainer, before it has written anything."""
        return Trainer(
            self.build(settings.gated),
            self.data,
            settings,
            out=out,
            example_inputs=self.example,
            identity=self.identity,
            device=self.args.device,
            table=self.table if settings.gated else None,
        )


def set_up(args: argparse.Namespace) -> Setup:
    """Checks the options, loads the data, and prepares the process for training.

    Raises:
        ValueError, TypeError: an option has a value that is not valid.
    """
    values.check(args)
    kind, data_root = values.dataset(args)
    require("train", "matplotlib", "tqdm", *(["sklearn"] if kind == "digits" else []))
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
        _checks.refuse(
            "pretrained", args.pretrained, "none: --recipe published initialises the weights itself"
        )
    path = args.latency_table
    table = None if path is None else LatencyTable.load(path, "latency_table")
    loading = _loading(args, kind)
    data = Ranks.here().in_turn(
        lambda: sets.load(kind, data_root, fraction, seed, loading, args.task)
    )
    if in_colour:
        data = sets.in_colour(data)
    widths = values.widths(args.widths) or values.default_widths(args.model)
    return Setup(args, kind, data, loading, widths, seed, fraction, table)


def _loading(args: argparse.Namespace, kind: str) -> Loading:
    """How images are loaded as batches."""
    workers = values.number("workers", args.workers, int)
    if workers is not None and kind != sets.IMAGES:
        _checks.refuse("workers", workers, f"none: {kind} is in memory")
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        workers = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    cuda = torch.cuda.is_available() if args.device is None else "cuda" in args.device
    return Loading(
        batch_size=_checks.whole("batch_size", values.chosen_numbers(args)["batch_size"]),
        image_size=values.number("image_size", args.image_size, int),
        augment=args.augment,
        workers=_checks.whole("workers", workers, 0, MAX_WORKERS),
        pin_memory=cuda,
    )
