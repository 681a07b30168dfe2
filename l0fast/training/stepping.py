"""The steps of a run: a whole epoch, and a single step from top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from l0fast._metrics import train_key
from l0fast.training.batches import Batches, rows_of, size_of
from l0fast.training.compiling import compiled, room_for_codes
from l0fast.training.cuda_graph import Steps, prevented, set_learning_rates
from l0fast.training.method import rates_at
from l0fast.training.metrics import Row
from l0fast.training.precision import Precision, steps_of
from l0fast.training.ranks import Ranks
from l0fast.training.run_state import RunState
from l0fast.training.settings import TrainerSettings
from l0fast.training.task import Task, total


class Stepping:
    """Trains a model, batch by batch.

    Args:
        state: of the run; the steps change it in place.
        task: has the loss.
        train: the training examples.
        settings: of the run.
        precision: of a forward.

    Attributes:
        base_lrs: the learning rate of each of the optimizer's groups, before its schedule.
        graph: the CUDA graph of a step, or why there is none.
    """

    def __init__(
        self,
        state: RunState,
        task: Task,
        train: Batches,
        settings: TrainerSettings,
        precision: Precision,
    ) -> None:
        self._state, self._task, self._train, self._settings = state, task, train, settings
        self._precision = precision
        self._ranks = Ranks.here()
        model = compiled(state.model, settings.compile)
        self._forward = self._ranks.parallel(model, state.device)
        self._total_steps = len(train) * settings.epochs
        self.base_lrs = [group["lr"] for group in state.optimizer.param_groups]
        self.graph = Steps(
            self._take_step,
            state.model,
            state.optimizer,
            settings.batch_size,
            settings.cuda_graph,
            prevented(settings, train.streamed),
        )
        self._loss_sum = torch.zeros((), device=state.device)
        self._metric_sum = torch.zeros((), dtype=torch.float64, device=state.device)

    def epoch(self) -> Row:
        """One pass over the training examples; the sums stay on the device until its end."""
        state, count = self._state, 0
        first, before = state.step, self._steps_of_adam()
        self._loss_sum.zero_()
        self._metric_sum.zero_()
        state.model.train()
        with self.graph.running(), room_for_codes(self._settings.compile):
            for item in self._train.epoch(state.epoch):
                lrs = rates_at(self.base_lrs, self._settings, state.step, self._total_steps)
                set_learning_rates(state.optimizer, lrs)
                self.graph(item)  # _take_step, or its CUDA graph
                size = self._train.size(item)
                count += size
                state.step += 1
                if size % self._ranks.size:  # dropout and the like drew other sizes on each process
                    self._ranks.same_noise_(state.device)
                if state.average is not None:
                    state.average.update()
                if state.term is not None and state.term.count_():
                    self.graph.renew()
        sums = [float(self._loss_sum), float(self._metric_sum)]
        loss, metric = self._ranks.summed(sums, state.device)
        row: Row = {"loss": loss / count}
        if self._task.of_training:
            row[train_key(self._task.metric)] = self._task.scale * metric / count
        self._ranks.same_tensors_(list(state.model.buffers()))
        if state.average is not None:
            self._ranks.same_tensors_(list(state.average.state_dict().values()))
        if self._precision.scaler is not None:
            row["skipped_steps"] = state.step - first - (self._steps_of_adam() - before)
        return row

    def _steps_of_adam(self) -> int:
        """Number of steps that the weights have taken; a scaler may skip some."""
        return 0 if self._precision.scaler is None else steps_of(self._state.optimizer)

    def _take_step(self, item: Any) -> None:
        """One step on a batch (see `Batches.batch`), without a host sync.

        The multipliers move even if a scaler has skipped the step of the weights: they depend on
        the density alone, which is known.
        """
        state, ranks, size = self._state, self._ranks, self._train.size(item)
        counts = ranks.count(size) > 0
        for part, last in parts_of(self._train.batch(item), self._settings.accumulate):
            here = size_of(part) if counts else 0
            alone = ranks.size > 1 and not last
            with self._forward.no_sync() if alone else nullcontext():
                with self._precision.forward():
                    loss, values = self._task.step(self._forward, part)
                # The mean over all processes is that over all examples of the batch.
                weight = here * ranks.size / size
                objective = loss if weight == 1 else loss * weight
                if last and state.term is not None:
                    objective = objective + state.term()
                self._precision.backward(objective)
            self._loss_sum += loss.detach() * here
            if values is not None and counts:
                self._metric_sum += total(values, here)
        if ranks.size > 1 and state.term is not None and state.term.starting:
            # DDP sets the gradient of open gates to 0, which would enter Adam's moments.
            for gate in state.term.handle.parameters():
                gate.grad = None
        self._precision.step(state.optimizer, self._settings.clip_grad_norm)
        state.optimizer.zero_grad()
        if state.term is not None:
            state.term.advance_()


def parts_of(batch: Any, parts: int) -> Iterator[tuple[Any, bool]]:
    """Yields (part of the batch, whether it is the last); the parts are as even as possible."""
    size = size_of(batch)
    parts = min(parts, size)
    if parts == 1:
        yield batch, True
        return
    for number in range(parts):
        rows = slice(number * size // parts, (number + 1) * size // parts)
        yield rows_of(batch, rows), number == parts - 1
