"""The constrained trainer: drives a model to the density asked for, then prunes it."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import _checks
from l0fast._files import write_atomically
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.stall import find_stalls, told
from l0fast.data.augment import augmented
from l0fast.data.sets import Data, Split, check_data
from l0fast.gating.sparsify import sparsify_
from l0fast.graph.calls import example_args
from l0fast.layers.handle import gated_layers
from l0fast.measures.flops import count_params
from l0fast.measures.latency import LatencyTable
from l0fast.pruning.prune import prune
from l0fast.pruning.report import report_of
from l0fast.pruning.saving import save_pruned
from l0fast.pruning.shrink import Idle, plan_removal, worthwhile
from l0fast.training.checkpoint import Checkpoint
from l0fast.training.cuda_graph import Steps, check_asked, set_learning_rates
from l0fast.training.folder import LATENCY, PLOT, PRUNED, UNSETTLED, RunFolder
from l0fast.training.method import make_optimizer
from l0fast.training.metrics import check_finite, constraint_metrics, error_percent, gate_metrics
from l0fast.training.resumable import Resumable, Row
from l0fast.training.settings import TrainerSettings
from l0fast.training.summary import asked, of_dense, of_pruned
from l0fast.training.tensorboard import scalar_writer

VALIDATION = "validation_error_percent"


class Trainer(Resumable):
    """Trains a model under its constraint, with checkpoints, and prunes it at the end.

    The data lie on the device as a whole; nothing is read back during an epoch. A checkpoint is
    written after each epoch; `fit(resume=True)` goes on from it and ends with the same weights,
    multipliers and metrics, bit for bit, as a run that was never interrupted.

    Args:
        model: any classifier; without gates and with a target or penalty, `sparsify_` gives it
            some (the defaults), in place.
        data: train, validation and test splits (see `l0fast.data.sets`).
        settings: how to train.
        out: folder for checkpoint.pt, metrics.jsonl, summary.json, dynamics.png and
            pruned.safetensors, and where TensorBoard is installed for tensorboard/; None writes
            nothing.
        identity: facts about model and data that a checkpoint must share to be resumed, and that
            head the summary ("dataset", "model", ...).
        device: where to train; CUDA if there is one, else the CPU.
        table: for measure="latency", what latencies are read off; None measures the model here,
            or takes the checkpoint's that is resumed.

    Attributes:
        pruned: after `fit`, the smaller plain model (None after dense training), of the epoch that
            `settings.select` names; `model` is that of the last epoch.
        history: one row of metrics an epoch.

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
        if not isinstance(model, nn.Module):
            _checks.refuse("model", type(model).__name__, "a torch.nn.Module", TypeError)
        check_data(data)
        if settings.select == "best" and data.validation is None:
            _checks.refuse("select", settings.select, "'last' without a validation split")
        if settings.augment != "none" and data.train.inputs.dim() != 4:
            shape = list(data.train.inputs.shape)
            _checks.refuse("augment", settings.augment, f"'none' for inputs {shape}: no images")
        if not (table is None or isinstance(table, LatencyTable)):
            _checks.refuse("table", table, "a LatencyTable or None", TypeError)
        if table is not None and settings.measure != "latency":
            _checks.refuse("table", "a latency table", f"none for measure={settings.measure!r}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = torch.zeros((), device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            _checks.refuse("device", str(device), f"a device of this machine ({reason})")
        check_asked(settings.cuda_graph, self.device)
        self.settings, self.table = settings, table
        try:
            self.identity: Row = json.loads(json.dumps(dict(identity or {})))
        except TypeError:
            _checks.refuse("identity", identity, "facts that JSON can hold", TypeError)
        self.folder = None if out is None else RunFolder(out)
        train, validation, test = (self._place(part) for part in data[:3])
        self.data = Data(train, validation, test, data.num_classes)
        model.to(self.device)
        if data.train.inputs.dim() == 4:
            model.to(memory_format=torch.channels_last)
        if settings.gated and not gated_layers(model):
            sparsify_(
                model,
                gates=settings.gates,
                example_inputs=self.example_inputs,
                skip=settings.skip,
            )
        self.model = model
        self.steps_per_epoch = math.ceil(len(data.train.targets) / settings.batch_size)
        self.total_steps = self.steps_per_epoch * settings.epochs
        self.term = self._make_term()
        self.optimizer = make_optimizer(model, settings, self.total_steps)
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._loss_sum = torch.zeros((), device=self.device)
        self._errors = torch.zeros((), dtype=torch.int64, device=self.device)
        self._steps = Steps(
            self._take_step, model, self.optimizer, settings.batch_size, settings.cuda_graph
        )
        self.best: Row | None = None
        self.idle = None if settings.shrink is None else Idle(settings.shrink)
        self.removals = []
        self.epoch = 0
        self.step = 0
        self.seconds = 0.0
        self.history: list[Row] = []
        self.pruned: nn.Module | None = None
        self.unsettled: Checkpoint | None = None
        self._opened = self.onward = False

    def _place(self, split: Any) -> Any:
        if split is None:
            return None
        # Convolutions and pooling run about twice as fast on a CPU with channels last.
        images = split.inputs.dim() == 4
        layout = torch.channels_last if images else torch.contiguous_format
        inputs = split.inputs.to(self.device, memory_format=layout)
        return Split(inputs, split.targets.to(self.device))

    # --- one epoch -----------------------------------------------------------------------------

    def _lr_factor(self) -> float:
        if self.settings.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.step / self.total_steps))

    def _take_step(self, index: Tensor) -> None:
        """One step on the training examples at `index`; nothing is read back."""
        train = self.data.train
        x = augmented(train.inputs, index, self.settings.augment)
        y = train.targets.index_select(0, index)
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        total = loss if self.term is None else loss + self.term()
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.term is not None:
            self.term.step()
        self._loss_sum += loss.detach() * len(index)
        self._errors += (logits.detach().argmax(1) != y).sum()

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
                factor = self._lr_factor()
                set_learning_rates(self.optimizer, [lr * factor for lr in self.base_lrs])
                self._steps(order[start : start + size])
                self.step += 1
        return {
            "loss": float(self._loss_sum) / count,
            "train_error_percent": 100 * int(self._errors) / count,
        }

    def _row(self, trained: Row) -> Row:
        """The metrics of the epoch just trained."""
        row: Row = {"epoch": self.epoch, **trained}
        if self.data.validation is not None:
            row[VALIDATION] = error_percent(self.model, self.data.validation)
        row["test_error_percent"] = error_percent(self.model, self.data.test)
        if self.term is not None:
            row |= gate_metrics(self.model)
        if isinstance(self.term, DensityConstraint):
            row |= constraint_metrics(self.term)
        if "lambda" in row and isinstance(self.term, DensityConstraint):
            targets = dict(zip(self.term.names, self.term.target.tolist(), strict=True))
            stalls = find_stalls([*self.history, row], targets, self.settings.epochs)
            rates = float(self.term.dual_lr), self.base_lrs[1]  # of the gates
            row["stalls"] = {name: stall.words(*rates) for name, stall in stalls.items()}
        return row

    # --- the whole run --------------------------------------------------------------------------

    def fit(self, *, resume: bool = False, on_epoch: Callable[[Row], None] | None = None) -> Row:
        """Trains to the end, prunes, and returns the summary (what summary.json holds).

        Args:
            resume: goes on from the checkpoint in `out`, if there is one.
            on_epoch: called with each row of metrics.

        Raises:
            ValueError: `out` holds another run, or its checkpoint does not fit; or the loss is
                not a number any more. Files of finished epochs stay as they are.
            OSError: `out` cannot be written.
        """
        if not self._opened:
            self.open(resume)
        out = None if self.folder is None else self.folder.path
        with scalar_writer(out, self.history) as write_scalars:
            for _ in range(self.epoch, self.settings.epochs):
                started = time.perf_counter()
                self._settle()
                trained = self._train_epoch()
                check_finite(self.model, trained["loss"], self.epoch + 1)
                self.epoch += 1
                row = self._row(trained)
                self.history.append(row)
                self._keep_best(row)
                self._shrink(row)
                self.seconds += time.perf_counter() - started
                self._save()
                write_scalars(row)
                if on_epoch is not None:
                    on_epoch(row)
        summary = self._summary()
        self._plot(summary)
        self.write_summary(summary)
        return summary

    def _settle(self) -> None:
        """Decides the gates, where the epochs begin that train without noise."""
        if self.term is None or self.epoch != self.settings.settles_at:
            return
        if self.onward:
            unsettled = self.unsettled = copy.deepcopy(self.checkpoint())
            if self.folder is not None:
                unsettled.write(self.folder / UNSETTLED)
        with warnings.catch_warnings():  # the metrics say how far the density has come
            warnings.filterwarnings("ignore", message="settle: ")
            self.term.settle(self.optimizer)
        if self.idle is not None and not self.onward:
            self._remove_closed(self.idle.count(self.model))

    def _shrink(self, row: Row) -> None:
        """Removes the gates that have seldom been open for long enough; says what is left."""
        if self.idle is None:
            return
        if not (self.onward and row["settled"]):  # the next run may open them again
            kept = self.idle.count(self.model)
            if worthwhile(kept):
                self._remove_closed(kept)
        row["params"] = count_params(self.model)

    def _remove_closed(self, kept: dict[str, Tensor]) -> None:
        """Removes what can go if only the gates of `kept` can open."""
        assert self.idle is not None
        args = example_args(self.example_inputs)
        removal, stuck = plan_removal(self.model, args, kept)
        self.idle.stuck |= stuck
        if removal is not None:
            self._remove(removal)

    def _keep_best(self, row: Row) -> None:
        """Keeps the model of the epoch just measured, if it is the best so far."""
        if self.settings.select == "last" or not row.get("feasible", True):
            return
        if self.epoch <= self.settings.settles_at < self.settings.epochs:
            return  # its gates are not decided
        error = row[VALIDATION]
        if self.best is None or error <= self.history[self.best["epoch"] - 1][VALIDATION]:
            state = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "model": state}

    def write_summary(self, summary: Row) -> None:
        """Puts `summary` into summary.json."""
        if self.folder is not None:
            self.folder.write_summary(summary)

    def _plot(self, summary: Row) -> None:
        if self.folder is None:
            return
        from l0fast.plots.dynamics import plot_dynamics

        targets = None
        if isinstance(self.term, DensityConstraint):
            targets = self.term.targets
        write_atomically(
            self.folder / PLOT, lambda path: plot_dynamics(self.history, targets, summary, path)
        )

    def _summary(self) -> Row:
        epoch, state = self.checkpoint().selected
        selected, model = self.history[epoch - 1], self.model
        if epoch != self.epoch:
            model = copy.deepcopy(model)
            model.load_state_dict(state)
        if self.term is None:
            outcome = of_dense(model, self.example_inputs, selected)
        else:
            self.pruned = prune(model, self.example_inputs, self.term)
            if self.folder is not None:
                save_pruned(self.pruned, self.folder / PRUNED)
                if isinstance(self.term, DensityConstraint) and self.term.table is not None:
                    self.term.table.save(self.folder / LATENCY)
            error = error_percent(self.pruned, self.data.test)
            before = self.history[min(epoch, self.settings.settles_at) - 1]
            outcome = of_pruned(report_of(self.pruned), self.settings, selected, error, before)
        return {
            **self.identity,
            **asked(self.settings),
            **outcome,
            "best_test_error_percent": min(row["test_error_percent"] for row in self.history),
            "selected_epoch": selected["epoch"],
            VALIDATION: selected.get(VALIDATION),
            "stalls": told(self.history),
            "seconds": round(self.seconds, 3),
            "settings": asdict(self.settings),
            "device": str(self.device),
            "cuda_graph": self._steps.status,
            "torch": torch.__version__,
        }
