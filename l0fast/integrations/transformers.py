"""Hugging Face transformers: a callback for its Trainer, and pruned models as folders."""

from __future__ import annotations

import base64
import io
import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from l0fast import _checks
from l0fast.integrations.pretrained import load_pretrained, save_pretrained
from l0fast.integrations.recipe import Recipe, given
from l0fast.layers.handle import gated_layers

__all__ = ["L0Callback", "load_pretrained", "save_pretrained"]

STATE = "attachment"
RESTORE = "restore_callback_states_from_checkpoint"
"""The Trainer's option to make new callbacks from a checkpoint when it resumes."""


def _refuse_without_gates(model: nn.Module, optimizer: Any) -> None:
    """Refuses an optimizer without the gates. The Trainer loads its state before `attach` puts the
    gates into its groups, so the sizes of the groups would not match."""
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    missing = [name for name, one in gated_layers(model).items() if id(one.log_alpha) not in held]
    if missing:
        got, expected = f"one without the gates of {missing[0]}", "one that has model.parameters()"
        _checks.refuse("optimizer", got, expected)


class L0Callback(TrainerCallback, ExportableState):
    """Trains a model's gates under a constraint, inside the Trainer's own steps.

    Equals:
        constraint = DensityConstraint(model, target, steps=...)
        constraint.attach(trainer.optimizer)
    when the training begins, and `detach()` at its end. Gradient accumulation, clipping, mixed
    precision and schedules stay the Trainer's. `resume_from_checkpoint` continues exactly where the
    training was, since the checkpoint's trainer_state.json has the constraint's state. With
    `load_best_model_at_end` the best model is chosen among those after the gates have settled.

    Densities and multipliers are in `state.log_history`, and in the logs that later callbacks get.
    The Trainer puts the loggers of `report_to` before this callback. To log the numbers, set
    report_to=[] and list the loggers yourself: callbacks=[L0Callback(...), WandbCallback()].

    Args:
        constraint: a constraint on the model; None to make one from the arguments below.
        target, measure, example_inputs: as of `DensityConstraint`.
        settle, start, gate_lr: as of `attach`.

    Attributes:
        constraint: the constraint, once the training has begun.

    Raises:
        ValueError, TypeError: there is neither a constraint nor a target, or both. When the
            training begins: the optimizer does not have the gates, or `load_best_model_at_end` is
            set and they never settle.
    """

    def __init__(
        self,
        constraint: Any = None,
        *,
        target: Any = None,
        measure: Any = None,
        example_inputs: Any = None,
        settle: float | None = None,
        start: float | None = None,
        gate_lr: float | None = None,
    ) -> None:
        options = given(target=target, measure=measure, example_inputs=example_inputs)
        if constraint is None and target is None:
            # With RESTORE the Trainer makes the callback without its options.
            expected = f"one of the two, or {RESTORE}=False where a training is resumed"
            _checks.refuse("constraint, target", "neither", expected)
        self._recipe = Recipe(
            constraint, options, given(settle=settle, start=start, gate_lr=gate_lr)
        )
        self._attachment: Any = None
        self._settled = False

    @property
    def constraint(self) -> Any:
        """The constraint, once the training has begun."""
        return self._recipe.constraint

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attaches the constraint, and goes on from a checkpoint if there is one."""
        if getattr(args, RESTORE, False):
            got, expected = True, "False (this callback restores its state without it)"
            _checks.refuse(RESTORE, got, expected)
        _refuse_without_gates(kwargs["model"], kwargs["optimizer"])
        saved = self._saved(state)
        with warnings.catch_warnings():
            if saved is not None:
                # The optimizer was loaded before; `saved` has the state that it lacks.
                warnings.filterwarnings("ignore", "attach: the optimizer had a state")
            attachment = self._recipe.begin(kwargs["model"], [kwargs["optimizer"]], state.max_steps)
        if args.load_best_model_at_end and attachment.last is None:
            self._recipe.end()
            expected = (
                "gates that settle (settle > 0), as no model before that is within the target"
            )
            _checks.refuse("load_best_model_at_end", True, expected)
        self._attachment = attachment
        if saved is not None:
            attachment.load_state_dict(saved)
        self._settled = self.constraint.settled
        # The Trainer saves into this entry; a checkpoint without the callback does not have it.
        state.stateful_callbacks.setdefault(L0Callback.__name__, {})

    @staticmethod
    def _saved(state: Any) -> dict[str, Any] | None:
        found = state.stateful_callbacks.get(L0Callback.__name__) if state.global_step else None
        found = found[-1] if isinstance(found, list) else found
        text = None if found is None else found["attributes"].get(STATE)
        if text is None:
            return None
        return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forgets the best model from before the gates settled: it is larger than the target."""
        if self.constraint.settled and not self._settled:
            self._settled = True
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds densities and multipliers to what is logged."""
        if self._attachment is None:
            return
        metrics = self._recipe.metrics()
        kwargs["logs"].update(metrics)
        if state.log_history:
            state.log_history[-1].update(metrics)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Detaches the constraint, which stays on the model for `prune`."""
        self._recipe.end()
        self._attachment = None

    def state(self) -> dict[str, Any]:
        """The state of the callback, for a checkpoint."""
        attributes: dict[str, Any] = {}
        if self._attachment is not None:
            buffer = io.BytesIO()
            torch.save(self._attachment.state_dict(), buffer)
            attributes[STATE] = base64.b64encode(buffer.getvalue()).decode("ascii")
        return {"args": {}, "attributes": attributes}
