"""Many short trainings, one CSV row each. Rows in the file are not trained again."""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import Trainer, TrainerSettings, measure_latency, sparsify_
from l0fast.data import sets
from l0fast.training import models

WIDTHS = {"mlp": ("mlp", [300, 100]), "lenet 8-16-64": ("lenet5", [8, 16, 64])}
LATENCY_BATCH = 1024
LATE = 3
"""Multipliers and densities are taken from the last third of the epochs before settling."""


class _Attention(nn.Module):
    """Attention with four heads and separate projections."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, _ = x.shape
        q, k, v = (
            layer(x).view(count, tokens, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(y.reshape(count, tokens, -1))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), _Attention(width))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class _ViT(nn.Module):
    """Patches of 2x2, two blocks, width 32."""

    def __init__(self, size: int, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(1, (size // 2) ** 2, width))
        self.blocks = nn.Sequential(_Block(width), _Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.blocks(x)).mean(1))


def _bn_conv() -> nn.Sequential:
    """Three 3x3 convolutions with batch norms, 16-32-64."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def build(name: str, in_shape: tuple[int, ...]) -> nn.Module:
    """Builds a dense model by its name in the results."""
    if name == "bn conv":
        return _bn_conv()
    if name == "vit":
        return _ViT(in_shape[-1])
    kind, widths = WIDTHS[name]
    return models.build(kind, in_shape, 10, widths)


@dataclass(frozen=True)
class Run:
    """One training."""

    dataset: str
    model: str
    target: float
    seed: int
    epochs: int
    gates: str = "auto"
    variant: str = ""
    """What the settings beside these are called."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Those settings."""

    @property
    def key(self) -> dict[str, str]:
        """The columns that identify its row, as strings."""
        return {name: str(value) for name, value in asdict(self).items() if name != "options"}


def train(run: Run, data_root: str | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains a run; returns its row, and its metrics by epoch."""
    dataset = sets.load(run.dataset, data_root, 1 / 12, run.seed)
    torch.manual_seed(run.seed)
    example = dataset.train.inputs[:1]
    dense = build(run.model, tuple(example.shape[1:]))
    model = sparsify_(dense, gates=run.gates, example_inputs=example)
    small = run.dataset == "digits"
    size: dict[str, Any] = {"batch_size": 64 if small else 128, "lr": 3e-3 if small else 1e-3}
    settings = TrainerSettings(
        density=run.target, epochs=run.epochs, seed=run.seed, **size, **run.options
    )
    table = None
    if settings.measure == "latency":  # that of one image would be overhead only
        table = measure_latency(model, dataset.train.inputs[:LATENCY_BATCH])
    trainer = Trainer(model, dataset, settings, device="cpu", table=table)
    summary = trainer.fit()
    report: Any = trainer.pruned
    (group,) = report.report.groups.values()
    rows = trainer.history
    drawn = [row for row in rows if not row["settled"]]
    multipliers = [row["lambda"]["model"] for row in drawn]
    densities = [row["density"]["model"] for row in drawn]
    late = len(drawn) - max(1, len(drawn) // LATE)
    met = [row["epoch"] for row in rows if row["density"]["model"] <= run.target]
    found: dict[str, Any] = {
        "feasible": summary["feasible"],
        "expected": densities[-1],
        "pruned": group["density"],
        "shortfall_percent": 100 * (run.target - group["density"]) / run.target,
        "forced": summary["forced"],
        "collapsed": " ".join(summary["collapsed"] + summary["reopened"]),
        "test_error_percent": summary["test_error_percent"],
        "met_at": met[0] / len(rows) if met else "",
        "multiplier_most": max(multipliers),
        "multiplier_end": multipliers[-1],
        "multiplier_late_sd": statistics.pstdev(multipliers[late:]),
        "density_late_range": max(densities[late:]) - min(densities[late:]),
        "restarts": sum(drawn[-1]["restarts"].values()),
        "stalled": bool(summary["stalls"]),
        "seconds": summary["seconds"],
    }
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in found.items()}
    return run.key | rounded, rows


def read(path: Path) -> list[dict[str, str]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def train_all(runs: Iterable[Run], path: Path, data_root: str | None) -> list[dict[str, str]]:
    """The rows of `runs`; those that are not in `path` yet are trained and added.

    A run that is refused or fails has its reason in `error` and no numbers.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = list(runs)
    done = read(path)
    for number, run in enumerate(wanted, 1):
        if any(run.key.items() <= row.items() for row in done):
            continue
        try:
            row, _ = train(run, data_root)
        except (ValueError, RuntimeError) as error:
            row = run.key | {"error": " ".join(str(error).split())}
        done.append({name: str(value) for name, value in row.items()})
        _write(done, path)
        print(f"{number}/{len(wanted)} " + " ".join(f"{k}={v}" for k, v in row.items()), flush=True)
    keys = [run.key for run in wanted]
    return [row for row in done if any(key.items() <= row.items() for key in keys)]


def _write(rows: list[dict[str, str]], path: Path) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def mean(rows: Iterable[Mapping[str, str]], name: str) -> float:
    """Of a column."""
    return statistics.fmean(float(row[name]) for row in rows)
