"""The trainer: trains a model to the density that is asked for, then prunes it."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from l0fast.data.sets import Data
from l0fast.graph.compare import tensors_of
from l0fast.graph.sites import unchanged_if_refused
from l0fast.measures.flops import count_params
from l0fast.measures.latency import LatencyTable
from l0fast.training.arguments import check_arguments, example_of, json_facts
from l0fast.training.average import Average
from l0fast.training.batches import are_images
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.cuda_graph import check_asked
from l0fast.training.folder import RunFolder
from l0fast.training.lone import refuse_lone_examples
from l0fast.training.matching import Run
from l0fast.training.method import make_optimizer, make_term, put_gates_
from l0fast.training.metrics import Evaluation, Row, check_finite, measure, stall_metrics
from l0fast.training.placement import place, usable_device
from l0fast.training.precision import Precision
from l0fast.training.ranks import Ranks
from l0fast.training.run_state import RunState
from l0fast.training.settings import TrainerSettings
from l0fast.training.shrinking import make_shrinking
from l0fast.training.stepping import Stepping
from l0fast.training.summary import Summary, result_of, summarise
from l0fast.training.task import LossFn, MetricFn, make_task
from l0fast.training.tensorboard import scalar_writer


class Trainer:
    """Trains a model under its constraint, with checkpoints, and prunes it at the end.

    Nothing is read back from the device during an epoch. A checkpoint is written after each epoch;
    `fit(resume=True)` goes on from it and ends with the same weights, multipliers and metrics, bit
    for bit, as a run that was never interrupted.

    Args:
        model: trained in place, by all processes of torch.distributed if it is set up. If the
            settings ask for gates and it has none, `sparsify_` puts them in.
        data: train, validation and test splits (see `l0fast.data.sets.Data`). A `Split` is moved
            to the device as a whole. A DataLoader, or any other object that gives batches each time
            it is iterated, is streamed; its random numbers depend on (seed, epoch) alone.
        settings: how to train.
        loss_fn: (model, batch) -> the mean loss of the batch, 0-d. The default is the loss of
            `settings.task`, for batches (inputs, targets).
        metric: (model, batch) -> a number for each example, or their mean (0-d); lower is better.
            It has the name of the function: `mae` is `test_mae` in the metrics. The default is the
            metric of `settings.task`, or the loss if `loss_fn` is given.
        example_inputs: as in `sparsify_`; by default the inputs (first part) of one example.
        out: folder that all processes see, for checkpoint.pt, metrics.jsonl, summary.json,
            dynamics.png, pruned.safetensors and (if it is installed) TensorBoard's files; None
            writes nothing.
        identity: facts about model and data ("dataset", "model", ...). The summary begins with
            them, and only a run with the same facts can resume the checkpoint.
        device: where to train; CUDA if there is one, else the CPU.
        table: the latency table for measure="latency". Without it, a resumed run takes the table of
            its checkpoint, and a new run measures the model on this machine.

    Attributes:
        model: as it is after the last epoch; with `ema`, its own weights and not the average (see
            `RunState.evaluated`).
        pruned: after `fit`, the pruned model of the epoch that `settings.select` names; None after
            a dense training.
        history: the metrics of each finished epoch.
        state: everything that the training changes.

    Raises:
        ValueError, TypeError: settings, targets or data are not valid. Nothing is written then.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: TrainerSettings,
        loss_fn: LossFn | None = None,
        metric: MetricFn | None = None,
        *,
        example_inputs: Any = None,
        out: str | Path | None = None,
        identity: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        table: LatencyTable | None = None,
    ) -> None:
        check_arguments(model, data, settings, table, loss_fn is not None)
        self.task = make_task(settings.task, loss_fn, metric)
        self.device = usable_device(device)
        check_asked(settings, not isinstance(data.train, tuple), self.device)
        self.settings, self.identity = settings, json_facts(identity)
        self._run_identity = {**self.identity, **asdict(settings)}
        if loss_fn or metric:
            self._run_identity["metric"] = self.task.metric
        self.ranks = Ranks.here()
        self.folder = RunFolder(out if self.ranks.first else None)
        self.ranks.of_first(self.folder.check)
        train, validation, test = place(data, settings, self.device)
        precision = Precision(settings.precision, self.device)
        self.evaluation = Evaluation(self.task, validation, test, precision)
        self.example_inputs = example_of(train, example_inputs, self.device)
        self.steps_per_epoch = len(train)
        self.total_steps = self.steps_per_epoch * settings.epochs
        model.to(self.device)
        refuse_lone_examples(model, train, settings, self.example_inputs)
        self.ranks.same_tensors_([*model.parameters(), *model.buffers()])
        self.ranks.same_generators_(self.device)
        if any(are_images(leaf) for leaf in tensors_of(self.example_inputs)):
            model.to(memory_format=torch.channels_last)
        if settings.measure == "latency":
            given = table
            table = self.ranks.of_first(
                lambda: self.folder.latency_table(given, self._run_identity, self.device)
            )
        self.model = model
        with unchanged_if_refused(model):
            put_gates_(model, settings, self.example_inputs)
            self.term = make_term(
                model, settings, self.total_steps, train.examples, self.example_inputs, table
            )
            self.optimizer = make_optimizer(model, settings, self.total_steps)
            shrinking = make_shrinking(model, self.optimizer, settings, self.example_inputs)
        self.state = RunState(
            self.device,
            model,
            self.optimizer,
            self.term,
            shrinking,
            self.task.metric,
            None if settings.ema is None else Average(model, settings.ema),
            precision.scaler,
        )
        self._stepping = Stepping(self.state, self.task, train, settings, precision)
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
            ValueError: `out` holds another run, or its checkpoint does not fit, or the loss or a
                weight is NaN or infinite. The files of finished epochs stay.
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
        """Runs one epoch (settles, trains, measures, shrinks, saves) and returns its metrics."""
        state, settings, started = self.state, self.settings, time.perf_counter()
        if state.epoch == settings.settles_at:
            self._settle()
        trained = self._stepping.epoch()
        check_finite(self.model, trained["loss"], state.epoch + 1)
        state.epoch += 1
        with state.evaluated():
            measured = measure(self.model, self.evaluation, state.epoch, self.term)
            row = {"epoch": state.epoch, **trained, **measured}
            state.history.append(row)
            if settings.may_select(state.epoch):
                state.keep_if_best()
        row |= stall_metrics(self.term, self.history, settings.epochs, self._stepping.base_lrs[-1])
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

    def _finish(self) -> Summary:
        """Prunes the selected model, writes the results, and returns the summary."""
        with self.state.evaluated():
            epoch, self.pruned, outcome = result_of(
                self.state, self.settings, self.evaluation, self.example_inputs
            )
        graph = self._stepping.graph.status
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
        """Prepares `out`: makes the folder, or reads the checkpoint to go on from (see `fit`).

        Args:
            resume: as in `fit`.
            start_from: a new run starts with its weights, gates, moments and generators.
            another_follows: whether another run will start from this one (see `next_start`). It may
                open gates again that settling closes here. So the checkpoint from before settling
                is kept, and closed gates are not removed.
        """
        self._another_follows = another_follows
        path = self.ranks.of_first(lambda: self.folder.open(resume))
        try:
            self._go_on_from(path, start_from)
        except BaseException:
            self.folder.close()
            raise
        self._opened = True

    def _go_on_from(self, path: Path | None, start_from: Checkpoint | None) -> None:
        """Loads the checkpoint of this run, or begins a new run."""
        if path is not None:
            checkpoint = Checkpoint.read(path, self.device)
            checkpoint.refuse_other_run(path, self._run_identity)
            self._as_asked.check(checkpoint, path)
            checkpoint.warn_of_rounding()
            self.state.load_(checkpoint, path)
            self.folder.write_metrics(self.history)  # a killed run may be an epoch behind in them
            return
        if start_from is not None:
            self._as_asked.check_start(start_from, self.folder.path or Path("start_from"))
            self.state.start_from_(start_from)
        self.folder.save(self.checkpoint())

    def next_start(self) -> Checkpoint:
        """After `fit`, the checkpoint that another run starts from: before settling, or last."""
        if self._unsettled is None and (path := self.ranks.of_first(self.folder.unsettled)):
            self._unsettled = Checkpoint.read(path, self.device)
        return self._unsettled or self.checkpoint()

    @property
    def _as_asked(self) -> Run:
        """The run that a checkpoint must fit."""
        return Run(
            self.state,
            self.settings,
            self.steps_per_epoch,
            self.evaluation.validation is not None,
            self._stepping.base_lrs,
            self.task.of_training,
        )

    def checkpoint(self) -> Checkpoint:
        """The present state of the run; its tensors are the model's own, not copies."""
        return self.state.checkpoint(self._run_identity)

    def write_summary(self, summary: Summary) -> None:
        """Writes `summary` into summary.json, over the present one."""
        self.folder.write_summary(summary)
