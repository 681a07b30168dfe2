"""The state of a run: all that training changes, and that a checkpoint holds."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0fast._metrics import ERROR, validation_key
from l0fast.graph.computed import copied
from l0fast.training.average import Average
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.generators import rng_state
from l0fast.training.method import Term
from l0fast.training.metrics import Row
from l0fast.training.ranks import Ranks
from l0fast.training.shrinking import Shrinking


@dataclass
class RunState:
    """All that changes while a run trains, between two epochs."""

    device: torch.device
    """Its generator is part of the state, as well as that of the CPU."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    term: Term | None
    """The constraint or penalty, with its multipliers; None for a dense training."""
    shrinking: Shrinking | None = None
    """None if the model keeps its size."""
    metric: str = ERROR
    """The name of the metric."""
    average: Average | None = None
    """The average of the weights, which is evaluated and pruned; None to use the weights."""
    scaler: Any = None
    """torch's GradScaler, with fp16."""
    epoch: int = 0
    """Number of finished epochs."""
    step: int = 0
    """Number of steps taken."""
    seconds: float = 0.0
    """Time spent in finished epochs."""
    history: list[Row] = field(default_factory=list)
    """The metrics of each finished epoch."""
    best: dict[str, Any] | None = None
    """With `select="best"`: "epoch" and "model" (a state dict) of the best epoch so far."""

    def checkpoint(self, identity: dict[str, Any]) -> Checkpoint:
        """The present state. Its tensors are not copies: training goes on to change them.

        Args:
            identity: facts that a run must have to go on from it.
        """
        return Checkpoint(
            identity=identity,
            epoch=self.epoch,
            step=self.step,
            seconds=self.seconds,
            history=self.history,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            term=None if self.term is None else self.term.state_dict(),
            best=self.best,
            average=None if self.average is None else self.average.state_dict(),
            scaler=None if self.scaler is None else self.scaler.state_dict(),
            threads=torch.get_num_threads(),
            ranks=size if (size := Ranks.here().size) > 1 else None,
            **({} if self.shrinking is None else self.shrinking.as_entries()),
            **rng_state(self.device),
        )

    def load_(self, checkpoint: Checkpoint, path: Path) -> None:
        """Loads a checkpoint of this run, in place.

        Its contents are not checked here: call `Run.check` (matching.py) first.

        Raises:
            ValueError: its model has other shapes; the message has `path`.
        """
        if self.shrinking is not None:
            self.shrinking.load_(checkpoint.removals, checkpoint.idle)
        checkpoint.refuse_other_model(path, self.model)
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.term is not None:
            self.term.load_state_dict(checkpoint.term or {})
        self.epoch, self.step = checkpoint.epoch, checkpoint.step
        self.seconds, self.history = checkpoint.seconds, checkpoint.history
        self.best = checkpoint.best
        if self.average is not None:
            self.average.load_state_dict(checkpoint.average or {})
        if self.scaler is not None:
            self.scaler.load_state_dict(checkpoint.scaler or {})
        checkpoint.restore_rng(self.device)

    def start_from_(self, checkpoint: Checkpoint) -> None:
        """Loads weights, gates, moments and generators of another run, not epochs and multipliers.

        The targets fall from the present densities of the model.
        """
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        checkpoint.restore_rng(self.device)
        if self.term is not None:
            self.term.open_(0)  # its gates have learned already

    def keep_if_best(self) -> None:
        """Keeps a copy of the model if it meets its targets, with the lowest validation metric."""
        row = self.history[-1]
        if not row.get("feasible", True):
            return
        best, name = self.best and self.history[self.best["epoch"] - 1], validation_key(self.metric)
        if best is None or row[name] <= best[name] or math.isnan(best[name]):
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "model": state}

    def evaluated(self) -> AbstractContextManager[object]:
        """Within it the model has the weights to evaluate and to prune: with `ema`, the average."""
        return nullcontext() if self.average is None else self.average.in_force()

    def selected(self) -> tuple[int, nn.Module]:
        """(epoch, model) of the result of the run: the best epoch, or the last."""
        if self.best is None or self.best["epoch"] == self.epoch:
            return self.epoch, self.model
        model = copied(self.model)
        model.load_state_dict(self.best["model"])
        return self.best["epoch"], model
