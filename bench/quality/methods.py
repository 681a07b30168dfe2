"""The methods that make a net smaller, each to the same size and in the same epochs."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bench.quality.tasks import LENGTHS, TASKS, load
from l0fast import Trainer, TrainerSettings, prune
from l0fast.data.formats import Split
from l0fast.data.sets import Data
from l0fast.training.models import PUBLISHED_SETTINGS, sparsify_published_
from l0fast.training.task import TASKS as KINDS

MEASURE = "params"
DENSE, SCRATCH, DEFAULT, PUBLISHED = (
    "dense",
    "from scratch",
    "constrained L0, default",
    "constrained L0, published settings",
)
COEFFICIENTS = (0.3, 1.0, 3.0)
"""Of the penalty, by the density of the gates; the best by validation is shown."""
PENALISED = {f"penalised L0, {coefficient:g}": coefficient for coefficient in COEFFICIENTS}
MAGNITUDE = {
    "gradual magnitude": "magnitude",
    "one-shot magnitude": "magnitude-one-shot",
}
METHODS = (DENSE, SCRATCH, *MAGNITUDE, *PENALISED, PUBLISHED, DEFAULT)
FEW = 100
"""Test images that the trainer looks at between epochs: the errors are measured at the end."""
EVALUATED_AT_ONCE = 1000


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    length: str
    target: float
    method: str
    seed: int

    @property
    def epochs(self) -> int:
        """Of the training; from scratch it has those of the dense net before, too."""
        task = TASKS[self.task]
        before = task.pretraining if self.method == SCRATCH else 0
        return before + task.epochs[LENGTHS.index(self.length)]


def _settings(run: Run) -> TrainerSettings:
    chosen: dict[str, Any] = TASKS[run.task].settings(fresh=run.method == SCRATCH)
    chosen |= {"epochs": run.epochs, "seed": run.seed}
    if run.method in PENALISED:
        return TrainerSettings(penalty=PENALISED[run.method], **chosen)
    if run.method in (DENSE, SCRATCH):
        return TrainerSettings(**chosen)
    if run.method in MAGNITUDE:
        chosen["method"] = MAGNITUDE[run.method]
    if run.method == PUBLISHED:
        chosen |= PUBLISHED_SETTINGS
    return TrainerSettings(density=run.target, measure=MEASURE, **chosen)


def _fitted(model: nn.Module, data: Data, settings: TrainerSettings) -> Trainer:
    few = Split(data.test.inputs[:FEW], data.test.targets[:FEW])
    trainer = Trainer(model, data._replace(validation=None, test=few), settings, device="cpu")
    trainer.fit()
    return trainer


@functools.lru_cache(maxsize=1)
def _dense(name: str, seed: int, data_root: str | None) -> tuple[nn.Module, Data]:
    """The dense net that a training starts from, with random weights or trained ones; its data."""
    task, data = TASKS[name], load(TASKS[name], seed, data_root)
    torch.manual_seed(seed)
    model = task.build(tuple(data.train.inputs.shape[1:]))
    if task.pretraining:
        settings = task.settings(fresh=True)
        trainer = _fitted(
            model, data, TrainerSettings(epochs=task.pretraining, seed=seed, **settings)
        )
        model = trainer.model
    return model, data


def _error(model: nn.Module, split: Split) -> float:
    """In percent; the model is put into evaluation mode."""
    batches = zip(*(part.split(EVALUATED_AT_ONCE) for part in split), strict=True)
    return KINDS["classification"].mean(model, batches)


def _row(run: Run, model: nn.Module, data: Data, dense_params: int) -> dict[str, Any]:
    """The row of a result; a layer through which nothing passes is a failure."""
    assert data.validation is not None
    report: Any = getattr(model, "report", None)
    params = sum(parameter.numel() for parameter in model.parameters())
    return {
        **vars(run),
        "epochs": run.epochs,
        "validation": round(_error(model, data.validation), 4),
        "test": round(_error(model, data.test), 4),
        "params": round(params / dense_params, 5),
        "shape": None if report is None else report.architecture,
        "collapsed": [] if report is None else list(report.collapsed),
    }


def train(run: Run, data_root: str | None) -> list[dict[str, Any]]:
    """The row of a run; after constrained L0 also that of its shape, trained from scratch."""
    start, data = _dense(run.task, run.seed, data_root)
    model, example = copy.deepcopy(start), data.train.inputs[:1]
    count = sum(parameter.numel() for parameter in model.parameters())
    if run.method == PUBLISHED:
        sparsify_published_(model, example)
    trainer = _fitted(model, data, _settings(run))
    if run.method == DENSE:
        return [_row(run, trainer.model, data, count)]
    if run.method in PENALISED:  # it has no target, so prune to the size now
        small = prune(trainer.model, example, run.target, measure=MEASURE)
        return [_row(run, small, data, count)]
    small = trainer.pruned
    assert small is not None
    rows = [_row(run, small, data, count)]
    if run.method == DEFAULT:
        again = replace(run, method=SCRATCH)
        fresh = copy.deepcopy(small)
        torch.manual_seed(run.seed)
        for module in fresh.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        _fitted(fresh, data, _settings(again))
        rows.append(_row(again, fresh, data, count) | {"collapsed": []})
    return rows
