"""The steps of a run: an epoch of them, and one from top to bottom."""

from __future__ import annotations

from typing import Any

import torch

from l0fast._metrics import train_key
from l0fast.training.batches import Batches, size_of
from l0fast.training.cuda_graph import Steps, set_learning_rates
from l0fast.training.method import rates_at
from l0fast.training.metrics import Row
from l0fast.training.run_state import RunState
from l0fast.training.settings import TrainerSettings
from l0fast.training.task import Task, total


class Stepping:
    """Trains a model, batch by batch.

    Args:
        state: of the run; the steps change it in place.
        task: what is minimised.
        train: what it is trained on.
        settings: of the run.

    Attributes:
        base_lrs: the learning rate of each of the optimizer's groups, before its schedule.
        graph: the CUDA graph of a step, or why there is none.
    """

    def __init__(
        self, state: RunState, task: Task, train: Batches, settings: TrainerSettings
    ) -> None:
        self._state, self._task, self._train, self._settings = state, task, train, settings
        self._total_steps = len(train) * settings.epochs
        self.base_lrs = [group["lr"] for group in state.optimizer.param_groups]
        self.graph = Steps(
            self._take_step,
            state.model,
            state.optimizer,
            settings.batch_size,
            settings.cuda_graph,
            "batches are streamed" if train.streamed else None,
        )
        self._loss_sum = torch.zeros((), device=state.device)
        self._metric_sum = torch.zeros((), dtype=torch.float64, device=state.device)

    def epoch(self) -> Row:
        """One pass over the training examples; the sums stay on the device until its end."""
        state, count = self._state, 0
        self._loss_sum.zero_()
        self._metric_sum.zero_()
        state.model.train()
        with self.graph.running():
            for item in self._train.epoch(state.epoch):
                lrs = rates_at(self.base_lrs, self._settings, state.step, self._total_steps)
                set_learning_rates(state.optimizer, lrs)
                self.graph(item)  # _take_step, or its CUDA graph
                count += size_of(item)
                state.step += 1
                if state.term is not None and state.term.count_():
                    self.graph.renew()
        row: Row = {"loss": float(self._loss_sum) / count}
        if self._task.of_training:
            row[train_key(self._task.metric)] = self._task.scale * float(self._metric_sum) / count
        return row

    def _take_step(self, item: Any) -> None:
        """One step on a batch (see `Batches.batch`); nothing is read back."""
        state, batch = self._state, self._train.batch(item)
        loss, values = self._task.step(state.model, batch)
        objective = loss if state.term is None else loss + state.term()
        objective.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.term is not None:
            state.term.advance_()
        size = size_of(batch)
        self._loss_sum += loss.detach() * size
        if values is not None:
            self._metric_sum += total(values, size)
