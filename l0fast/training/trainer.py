"""The constrained trainer: trains a model down to the density asked for, then prunes it."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast.data.augment import augmented
from l0fast.data.sets import Data
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.handle import gated_layers, gates
from l0fast.measures.flops import count_params
from l0fast.measures.latency import LatencyTable
from l0fast.pruning.prune import prune
from l0fast.pruning.report import required_report
from l0fast.training.arguments import check_arguments, json_facts
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.cuda_graph import Steps, check_asked, set_learning_rates
from l0fast.training.folder import RunFolder
from l0fast.training.matching import Run
from l0fast.training.method import make_optimizer, make_term, rates_at
from l0fast.training.metrics import Row, check_finite, error_percent, measure, stall_metrics
from l0fast.training.placement import place_data, place_model_, usable_device
from l0fast.training.run_state import RunState
from l0fast.training.settings import TrainerSettings
from l0fast.training.shrinking import make_shrinking
from l0fast.training.summary import Summary, outcome_of_dense, outcome_of_pruned, summarise
from l0fast.training.tensorboard import scalar_writer


class Trainer:
    """Trains a model under its constraint, with checkpoints, and prunes it at the end.

    The data lie on the device as a whole; nothing is read back during an epoch. A checkpoint is
    written after each epoch; `fit(resume=True)` goes on from it and ends with the same weights,
    multipliers and metrics, bit for bit, as a run that was never interrupted.

    Args:
        model: any classifier, trained in place. If the settings ask for gates and it has none,
            `sparsify_` gives it some.
        data: train, validation and test splits (see `l0fast.data.sets`).
        settings: how to train.
        out: folder for checkpoint.pt, metrics.jsonl, summary.json, dynamics.png and
            pruned.safetensors, and for tensorboard/ where TensorBoard is installed; None writes
            nothing.
        identity: facts about model and data ("dataset", "model", ...). They head the summary, and a
            checkpoint is resumed only by a run that has the same.
        device: where to train; CUDA if there is one, else the CPU.
        table: the latency table for measure="latency". Without it, a resumed run takes its
            checkpoint's, and a new one measures the model here.

    Attributes:
        model: as of the last epoch.
        pruned: after `fit`, the smaller plain model of the epoch that `settings.select` names; None
            after dense training.
        history: the metrics of each finished epoch.
        state: all that training changes.

    Raises:
        ValueError, TypeError: settings, targets or data out of range, before anything is written.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainerSettings,
        *,
        out: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        table: LatencyTable | None = None,
    ) -> None:
        check_arguments(model, data, settings, table)
        self.device = usable_device(device)
        check_asked(settings.cuda_graph, self.device)
        self.settings, self.identity = settings, json_facts(identity)
        self._run_identity = {**self.identity, **asdict(settings)}
        self.folder = RunFolder(out)
        self.data = place_data(data, self.device)
        self.example_inputs = self.data.train.inputs[:1]
        examples = len(data.train.targets)
        self.steps_per_epoch = math.ceil(examples / settings.batch_size)
        self.total_steps = self.steps_per_epoch * settings.epochs
        place_model_(model, data, self.device)
        if settings.gated and not gated_layers(model):
            where, skip = settings.gates, settings.skip
            sparsify_(model, gates=where, example_inputs=self.example_inputs, skip=skip)
        if settings.measure == "latency":
            table = self.folder.latency_table(table, self._run_identity, self.device)
        if settings.gated:
            gates(model).forget_constraints()  # only the settings' targets hold
        self.model = model
        self.term = make_term(
            model, settings, self.total_steps, examples, self.example_inputs, table
        )
        self.optimizer = make_optimizer(model, settings, self.total_steps)
        self._base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._steps = Steps(
            self._take_step, model, self.optimizer, settings.batch_size, settings.cuda_graph
        )
        self._loss_sum = torch.zeros((), device=self.device)
        self._errors = torch.zeros((), dtype=torch.int64, device=self.device)
        shrinking = make_shrinking(model, self.optimizer, settings, self.example_inputs)
        self.state = RunState(self.device, model, self.optimizer, self.term, shrinking)
        self.pruned: nn.Module | None = None
        self._opened = self._another_follows = False
        self._unsettled: Checkpoint | None = None

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return self.state.epoch

    @property
    def history(self) -> list[Row]:
        """The metrics of each finished epoch."""
        return self.state.history

    # --- a run, from top to bottom --------------------------------------------------------------

    def fit(
        self, *, resume: bool = False, on_epoch: Callable[[Row], None] | None = None
    ) -> Summary:
        """Trains to the end, prunes, and returns the summary (what summary.json holds).

        Args:
            resume: goes on from the checkpoint in `out`, if there is one.
            on_epoch: called with each row of metrics.

        Raises:
            ValueError: `out` holds another run, or its checkpoint does not fit; or the loss or a
                weight became NaN or infinite. Files of finished epochs stay as they are.
            OSError: `out` cannot be written.
        """
        if not self._opened:
            self.open(resume)
        with closing(self.folder):
            with scalar_writer(self.folder.path, self.history) as write_scalars:
                while self.epoch < self.settings.epochs:
                    row = self._run_epoch()
                    write_scalars(row)
                    if on_epoch is not None:
                        on_epoch(row)
            return self._finish()

    def _run_epoch(self) -> Row:
        """One epoch: settles, trains, measures, shrinks and saves; returns its metrics."""
        state, settings, started = self.state, self.settings, time.perf_counter()
        if state.epoch == settings.settles_at:
            self._settle()
        trained = self._train_epoch()
        check_finite(self.model, trained["loss"], state.epoch + 1)
        state.epoch += 1
        row = {"epoch": state.epoch, **trained, **measure(self.model, self.data, self.term)}
        state.history.append(row)
        row |= stall_metrics(self.term, self.history, settings.epochs, self._base_lrs[-1])
        if settings.may_select(state.epoch):
            state.keep_if_best()
        if state.shrinking is not None:
            if not (self._another_follows and row["settled"]):
                state.shrinking.remove_idle()
            row["params"] = count_params(self.model)
        state.seconds += time.perf_counter() - started
        self.folder.save(self.checkpoint())
        return row

    def _settle(self) -> None:
        """Decides the gates; the epochs from here on train without noise."""
        assert self.term is not None
        if self._another_follows:
            self._unsettled = copy.deepcopy(self.checkpoint())
            self.folder.save_unsettled(self._unsettled)
        with warnings.catch_warnings():  # the metrics show how far the density has come
            warnings.filterwarnings("ignore", message="settle: ")
            self.term.settle(self.optimizer)
        if self.state.shrinking is not None and not self._another_follows:
            self.state.shrinking.remove_closed()

    def _train_epoch(self) -> Row:
        """One pass over the training examples; the sums stay on the device until its end."""
        size, count = self.settings.batch_size, len(self.data.train.targets)
        # The order depends on (seed, epoch) alone, so a resumed run sees the same.
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator).to(self.device)
        self._loss_sum.zero_()
        self._errors.zero_()
        self.model.train()
        with self._steps.running():
            for start in range(0, count, size):
                lrs = rates_at(self._base_lrs, self.settings, self.state.step, self.total_steps)
                set_learning_rates(self.optimizer, lrs)
                self._steps(order[start : start + size])  # _take_step, or its CUDA graph
                self.state.step += 1
                if self.term is not None and self.term.count_():
                    self._steps.renew()
        return {
            "loss": float(self._loss_sum) / count,
            "train_error_percent": 100 * int(self._errors) / count,
        }

    def _take_step(self, index: Tensor) -> None:
        """One step on the training examples at `index`; nothing is read back."""
        x = augmented(self.data.train.inputs, index, self.settings.augment)
        y = self.data.train.targets.index_select(0, index)
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        objective = loss if self.term is None else loss + self.term()
        objective.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.term is not None:
            self.term.advance_()
        self._loss_sum += loss.detach() * len(index)
        self._errors += (logits.detach().argmax(1) != y).sum()

    def _finish(self) -> Summary:
        """Prunes the selected model, writes what a finished run leaves, returns the summary."""
        epoch, model = self.state.selected()
        if self.term is None:
            outcome = outcome_of_dense(model, self.example_inputs, self.history[epoch - 1])
        else:
            self.pruned = prune(model, self.example_inputs, self.term)
            error = error_percent(self.pruned, self.data.test)
            report = required_report(self.pruned)
            outcome = outcome_of_pruned(report, self.settings, self.history, epoch, error)
        graph = self._steps.status
        summary = summarise(self.identity, self.settings, self.state, epoch, outcome, graph)
        self.folder.write_results(self.pruned, self.term, self.history, summary)
        return summary

    # --- checkpoints ----------------------------------------------------------------------------

    def open(
        self,
        resume: bool = False,
        start_from: Checkpoint | None = None,
        another_follows: bool = False,
    ) -> None:
        """Makes `out` ready: a new folder, or the checkpoint to go on from (see `fit`).

        Args:
            resume: as in `fit`.
            start_from: a new run starts with the weights, gates, moments and noise of this one.
            another_follows: another run will start from this one (see `next_start`), and may open
                gates again that settling closes here. So the checkpoint from before settling is
                kept, and closed gates are not removed.
        """
        self._another_follows = another_follows
        path = self.folder.open(resume)
        try:
            self._go_on_from(path, start_from)
        except BaseException:
            self.folder.close()
            raise
        self._opened = True

    def _go_on_from(self, path: Path | None, start_from: Checkpoint | None) -> None:
        """Takes the checkpoint of this run, or begins a new run."""
        if path is not None:
            checkpoint = Checkpoint.read(path, self.device)
            checkpoint.refuse_other_run(path, self._run_identity)
            self._as_asked.check(checkpoint, path)
            checkpoint.warn_of_threads()
            self.state.load_(checkpoint, path)
            self.folder.write_metrics(self.history)  # a kill may have left them an epoch behind
            return
        if start_from is not None:
            self._as_asked.check_start(start_from, self.folder.path or Path("start_from"))
            self.state.start_from_(start_from)
        self.folder.save(self.checkpoint())

    def next_start(self) -> Checkpoint:
        """Where another run starts from, after `fit`: before the gates settled, or the end."""
        return self._unsettled or self.folder.read_unsettled(self.device) or self.checkpoint()

    @property
    def _as_asked(self) -> Run:
        """What a checkpoint must fit."""
        validation = self.data.validation is not None
        return Run(self.state, self.settings, self.steps_per_epoch, validation, self._base_lrs)

    def checkpoint(self) -> Checkpoint:
        """The state of the run as it is; its tensors are the model's own."""
        return self.state.checkpoint(self._run_identity)

    def write_summary(self, summary: Summary) -> None:
        """Writes `summary` into summary.json, in place of the one that is there."""
        self.folder.write_summary(summary)
