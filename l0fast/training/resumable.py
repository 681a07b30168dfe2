"""A run between two epochs: what it is made of, saved, and gone on from bit for bit."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.constraints.constraint import DensityConstraint
from l0fast.data.sets import Data
from l0fast.graph.calls import example_args
from l0fast.measures.latency import LatencyTable
from l0fast.pruning.shrink import Idle, Removal, remove_
from l0fast.training.checkpoint import CHECKPOINT, Checkpoint, rng_state
from l0fast.training.folder import UNSETTLED, RunFolder
from l0fast.training.method import Term, make_term
from l0fast.training.settings import TrainerSettings

Row = dict[str, Any]


class Resumable:
    """The half of the `Trainer` that knows checkpoints: it sets these attributes and trains."""

    model: nn.Module
    data: Data
    settings: TrainerSettings
    table: LatencyTable | None
    identity: Row
    device: torch.device
    folder: RunFolder | None
    term: Term | None
    optimizer: torch.optim.Optimizer
    total_steps: int
    epoch: int
    step: int
    seconds: float
    history: list[Row]
    best: Row | None
    idle: Idle | None
    removals: list[Removal]
    unsettled: Checkpoint | None
    onward: bool
    _opened: bool

    @property
    def example_inputs(self) -> Tensor:
        """One training example."""
        return self.data.train.inputs[:1]

    def _identity(self) -> Row:
        """What a checkpoint must share with this run to be resumed."""
        return {**self.identity, **asdict(self.settings)}

    def _make_term(self) -> Term | None:
        """The term of the loss; by the latency table of the checkpoint to go on from, if there is
        one: rates and schedules go by shares of it, and another measurement has others."""
        examples = len(self.data.train.targets)
        steps = self.total_steps
        table = self._known_table()
        if table is None:
            table = self.table
        elif self.table is not None and self.table.as_json() != table.as_json():
            assert self.folder is not None
            expected = f"the one of {self.folder / CHECKPOINT}, or none"
            _checks.refuse("table", "another latency table", expected)
        return make_term(self.model, self.settings, steps, examples, self.example_inputs, table)

    def _known_table(self) -> LatencyTable | None:
        """What the checkpoint in `out` knows of latency; if it is another run's, `open` says so."""
        path = None if self.folder is None else self.folder / CHECKPOINT
        if self.settings.measure != "latency" or path is None or not path.is_file():
            return None
        with suppress(ValueError):
            checkpoint = Checkpoint.read(path, self.device)
            checkpoint.refuse_other_run(path, self._identity())
            return checkpoint.table
        return None

    def _remove(self, removal: Removal) -> None:
        args = example_args(self.example_inputs)
        remove_(self.model, removal, args, self.settings.skip, self.optimizer)
        self.removals.append(removal)
        if self.idle is not None:
            self.idle.follow(removal)

    def open(
        self, resume: bool = False, after: Checkpoint | None = None, onward: bool = False
    ) -> None:
        """Makes `out` ready: a new folder, or the checkpoint to go on from (see `fit`).

        Args:
            resume: as in `fit`.
            after: a new run starts with the weights, gates, moments and noise of this one.
            onward: another will start from this one: what it was before its gates settled is kept
                (see `to_go_on_from`), and what they leave closed is not removed.
        """
        self._opened, self.onward = True, onward
        path = None if self.folder is None else self.folder.open(resume)
        if path is None and after is not None:
            self.model.load_state_dict(after.model)
            self.optimizer.load_state_dict(after.optimizer)
            after.restore_rng(self.device)
            if isinstance(self.term, DensityConstraint):
                self.term.begin_()
        if self.folder is None:
            return
        if path is None:
            self._save()
        else:
            self._load(path)
            self.folder.write_metrics(self.history)  # the checkpoint may be an epoch ahead of them
        self.folder.sweep()

    def to_go_on_from(self) -> Checkpoint:
        """Where another run starts from, after `fit`: before the gates settled, or the end."""
        if self.unsettled is None and self.folder is not None:
            path = self.folder / UNSETTLED
            if path.exists():
                self.unsettled = Checkpoint.read(path, self.device)
        return self.unsettled or self.checkpoint()

    def checkpoint(self) -> Checkpoint:
        """The state of the run as it is; its tensors are the model's own."""
        return Checkpoint(
            identity=self._identity(),
            epoch=self.epoch,
            step=self.step,
            seconds=self.seconds,
            history=self.history,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            term=None if self.term is None else self.term.state_dict(),
            best=self.best,
            removals=[one.as_json() for one in self.removals] or None,
            idle=None if self.idle is None else self.idle.as_json(),
            **rng_state(self.device),
        )

    def _save(self) -> None:
        if self.folder is not None:
            self.checkpoint().write(self.folder / CHECKPOINT)
            self.folder.write_metrics(self.history)

    def _load(self, path: Path) -> None:
        checkpoint = Checkpoint.read(path, self.device)
        checkpoint.refuse_other_run(path, self._identity())
        for entry in checkpoint.removals or []:
            self._remove(Removal.from_json(entry))
        checkpoint.refuse_other_model(path, self.model)
        self.model.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        if self.term is not None:
            self.term.load_state_dict(checkpoint.term or {})
        self.epoch, self.step = checkpoint.epoch, checkpoint.step
        self.seconds, self.history = checkpoint.seconds, checkpoint.history
        self.best = checkpoint.best
        if self.idle is not None and checkpoint.idle is not None:
            self.idle.set(checkpoint.idle)
        checkpoint.restore_rng(self.device)
