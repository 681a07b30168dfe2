"""The loss that a training minimises, and the metric that it reports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import _checks
from l0fast._metrics import ERROR
from l0fast.training.batches import size_of
from l0fast.training.ranks import Ranks

LossFn = Callable[[Any, Any], Tensor]
"""(model, batch) -> 0-d: the mean over the examples of the batch."""
MetricFn = Callable[[Any, Any], Tensor]
"""(model, batch) -> a number for each example ([N], or more dimensions), or their mean (0-d)."""


def total(values: Tensor, size: int) -> Tensor:
    """0-d: the sum over the examples of a batch. `values` has a number for each, or their mean."""
    if values.dtype in (torch.float16, torch.bfloat16):  # a sum of many would be inexact
        values = values.float()
    if values.dim() == 0:
        return values * size
    return values.sum() if values.dim() == 1 else values.flatten(1).float().mean(1).sum()


@dataclass(frozen=True)
class Task:
    """The loss that a training minimises, and the metric that it reports.

    Args:
        metric: name of the metric; lower is better.
        step: (model, batch) -> the loss of the batch (0-d), and the metric of its examples, or None
            if that needs another forward.
        values: (model, batch) -> the metric of its examples.
        scale: factor of the metric: 100 if the values are shares and the metric is in percent.
    """

    metric: str
    step: Callable[[Any, Any], tuple[Tensor, Tensor | None]]
    values: MetricFn
    scale: float = 1.0
    of_training: bool = False
    """Whether `step` returns the metric, too."""

    def mean(self, model: nn.Module, batches: Iterable[Any]) -> float:
        """The metric over the examples of all processes; puts the model into evaluation mode."""
        device = next(model.parameters()).device
        found, count = Ranks.here().summed(self._sum(model, batches), device)
        return self.scale * found / count

    @torch.no_grad()
    def _sum(self, model: nn.Module, batches: Iterable[Any]) -> tuple[float, int]:
        """The sum of the values over the examples of this process, unscaled, and their number."""
        model.eval()
        sums: list[Tensor] = []
        count = 0
        for batch in batches:
            size = size_of(batch)
            sums.append(total(self.values(model, batch), size))
            count += size
        return sum(torch.stack(sums).tolist()) if sums else 0.0, count


def _supervised(
    metric: str,
    loss: Callable[[Tensor, Tensor], Tensor],
    values: Callable[[Tensor, Tensor], Tensor],
    scale: float = 1.0,
) -> Task:
    """A task for batches (inputs, targets), made of functions of (outputs, targets)."""

    def step(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = _pair(batch)
        outputs = model(inputs)
        return loss(outputs, targets), values(outputs.detach(), targets)

    def of(model: Any, batch: Any) -> Tensor:
        inputs, targets = _pair(batch)
        outputs = model(inputs)
        found = values(outputs, targets)
        # A comparison hides NaN. (In a training step the loss shows it.)
        lost = outputs.isnan() if found.dim() == outputs.dim() else outputs.isnan().any(1)
        return torch.where(lost, torch.nan, found)

    return Task(metric, step, of, scale, of_training=True)


def _pair(batch: Any) -> Any:
    """The batch, if it is (inputs, targets)."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        many = f" of {len(batch)}" if hasattr(batch, "__len__") else ""
        expected = "(inputs, targets), or a loss_fn and a metric that take such batches"
        _checks.refuse("batch", f"{type(batch).__name__}{many}", expected)
    return batch


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    shape = (*outputs.shape[:1], *outputs.shape[2:])
    if targets.shape != shape or targets.dtype not in (torch.int64, torch.uint8):
        expected = f"int64 classes of shape {shape}, one for each output of the model"
        _checks.refuse("targets", f"{targets.dtype} of shape {tuple(targets.shape)}", expected)
    return F.cross_entropy(outputs, targets)


def _checked(outputs: Tensor, targets: Tensor) -> None:
    """Refuses targets whose shape differs from the outputs'; PyTorch would broadcast them."""
    if outputs.shape != targets.shape:
        expected = f"shape {tuple(outputs.shape)}, that of the model's outputs"
        _checks.refuse("targets", f"shape {tuple(targets.shape)}", expected)


def _mean_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    _checked(outputs, targets)
    return F.mse_loss(outputs, targets)


def _cross_entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    _checked(outputs, targets)
    return F.binary_cross_entropy_with_logits(outputs, targets)


def _squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square()


def _wrong_labels(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs > 0) != (targets > 0.5)


TASKS: dict[str, Task] = {
    "classification": _supervised(
        ERROR, _cross_entropy, lambda outputs, targets: outputs.argmax(1) != targets, 100
    ),
    "regression": _supervised("squared_error", _mean_squared, _squared),
    "multilabel": _supervised("label_error_percent", _cross_entropies, _wrong_labels, 100),
}


def make_task(name: str, loss_fn: LossFn | None, metric: MetricFn | None) -> Task:
    """The task with that name, or a task made of the user's functions.

    Args:
        name: in `TASKS`; its loss is used unless `loss_fn` is given.
        loss_fn, metric: as of `Trainer`.

    Raises:
        ValueError, TypeError: one of them cannot be called, or the metric has no usable name.
    """
    for label, function in (("loss_fn", loss_fn), ("metric", metric)):
        if function is not None and not callable(function):
            _checks.refuse(label, function, "a function of (model, batch), or None", TypeError)
    known = TASKS[name]
    if loss_fn is None and metric is None:
        return known
    key = "loss" if metric is None else getattr(metric, "__name__", type(metric).__name__)
    if not key.isidentifier():
        _checks.refuse("metric", key, "a function with a name, not a lambda")
    loss: LossFn = loss_fn or (lambda model, batch: known.step(model, batch)[0])
    return Task(key, lambda model, batch: (loss(model, batch), None), metric or loss)
