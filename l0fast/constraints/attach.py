"""The door of attaching: a constraint is called and stepped by the user, or by an optimizer."""

from __future__ import annotations

from typing import Any, Self, cast

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.autograd import Pull
from l0fast.constraints.attachment import Attachment
from l0fast.constraints.defaults import SETTLE
from l0fast.constraints.processes import check_sharding, mesh_of
from l0fast.constraints.start import START, Starting, start_steps
from l0fast.constraints.watch import Watch


def own_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The PyTorch optimizer inside the wrappers of Accelerate and Lightning."""
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = inner
    if not isinstance(found, torch.optim.Optimizer):
        _checks.refuse("optimizer", type(optimizer).__name__, "a torch.optim.Optimizer", TypeError)
    return found


class Attachable(Starting):
    """A constraint, a penalty or several: called and stepped by the user, or by an optimizer."""

    steps: int | None = None
    """Of the whole training, if it is known."""
    start_share: float = START
    """The share of the steps in which all gates are open, where `attach` is not told."""

    @property
    def attachment(self) -> Attachment | None:
        """What `attach` has made, or None."""
        return self.__dict__.get("_attachment")

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no part in the optimizer's steps.
        state = cast("dict[str, Any]", super().__getstate__())
        return {key: value for key, value in state.items() if key not in ("_attachment", "_watch")}

    def _refuse_attached(self, what: str) -> None:
        if self.attachment is not None:
            raise RuntimeError(
                f"{type(self).__name__}: it is attached, so optimizer.step() already does what "
                f"{what} does. Take {what} out of the training loop, or call detach() first"
            )

    def value(self) -> Tensor:
        """0-d: the term to add to the loss."""
        raise NotImplementedError

    def pull(self) -> Pull | None:
        """What the gradient of the term is made of, where one launch can have it."""
        return None

    def advance_(self) -> None:
        """Ends a step, but for what is counted on the host (see `count_`)."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """0-d: the term to add to the loss."""
        if torch.is_grad_enabled():
            self._refuse_attached("the term in the loss")
            if mesh_of(self.handle.layers) is not None and self.attachment is None:
                raise RuntimeError(
                    f"{type(self).__name__}: the model is sharded by FSDP2, so its term cannot be "
                    "in the loss. Call attach(optimizer), which averages the gates' gradients"
                )
        return self.value()

    def step(self) -> None:
        """Ends a training step; call it after `optimizer.step()`.

        It moves the multipliers, if there are any, and puts every log_alpha back into its bounds.
        """
        self._refuse_attached("step()")
        watch: Watch = self.__dict__.setdefault("_watch", Watch())
        watch.look(self)
        self.refuse_capture("step()")
        self.advance_()
        self.count_()

    def count_(self) -> bool:
        return super().count_() if self.attachment is None else self.attachment.count_()

    def lags(self) -> list[float]:
        """How far each density is above its target in force; a penalty has none."""
        return [0.0]

    def attach(
        self,
        optimizer: Any,
        *,
        settle: float = SETTLE,
        start: float | None = None,
        steps: int | None = None,
        gate_lr: float | None = None,
    ) -> Self:
        """Makes the constraint a part of `optimizer.step()`: the training loop stays as it is.

        From now on, each step of the optimizer adds the gradient of the constraint's term to that
        of the gates, moves the gates by an Adam of their own, and then moves the multipliers.
        Gradient accumulation, clipping, GradScaler, closures and the optimizer's learning rate
        have no influence on that. The state is in the optimizer's `state_dict`, under "l0fast". To
        resume a training, call `attach` first, then load the optimizer's state.

        Args:
            optimizer: the one of the weights. It may hold the gates or not. A wrapper of
                Accelerate or Lightning is fine, and so is a list of optimizers: then the steps of
                the first one count, and the others do not move the gates.
            settle: the share of the steps at the end in which the gates are decided and training
                is without noise (see `settle`), in [0, 1); 0 for never.
            start: the share of the steps at the beginning in which all gates are open, without
                noise, in [0, 1) (see `DensityConstraint`). By default that of the constraint.
            steps: optimizer steps of the whole training, >= 1. By default those of the constraint.
            gate_lr: learning rate of the gates' Adam, > 0. By default it follows from `steps` (see
                `param_groups`).

        Returns:
            The constraint itself.

        Raises:
            ValueError, TypeError: no optimizer, no `steps`, a share out of its range, gates that
                do not require grad or are sharded, adapters on gated layers, or a model that
                already has an attached constraint.
        """
        optimizers = [own_optimizer(one) for one in _as_list(optimizer)]
        if not optimizers:
            _checks.refuse("optimizer", optimizer, "a torch.optim.Optimizer", TypeError)
        start = self.start_share if start is None else start
        shares = {"settle": settle, "start": start}
        for name, share in shares.items():
            _checks.number(name, share, "a share in [0, 1)", low=0.0, high=1.0, open_high=True)
        if settle + start >= 1:
            _checks.refuse("start + settle", start + settle, "less than 1")
        if gate_lr is not None:
            _checks.number("gate_lr", gate_lr, "a number > 0", low=0.0, open_low=True)
        steps = self.steps if steps is None else steps
        if steps is None:
            _checks.refuse("steps", None, "the number of optimizer steps of the whole training")
        _checks.whole("steps", steps)
        for constraint in self.handle.constraints:
            if constraint.attachment is not None:
                expected = (
                    "one attached constraint on a model: put several into Constraints and attach "
                    "that, or detach() the other one first"
                )
                _checks.refuse("attach", f"{type(constraint).__name__} attached", expected)
        check_sharding("attach", self.handle.layers)
        self.handle.check_adapters("attach")
        if self.learns:
            frozen = [n for n, one in self.handle.layers.items() if not one.log_alpha.requires_grad]
            if frozen:
                words = f"gates that do not require grad: {', '.join(frozen)}"
                expected = "gates to train (call log_alpha.requires_grad_() on these layers)"
                _checks.refuse("attach", words, expected)
        attachment = Attachment(self, optimizers, steps, settle, gate_lr)
        self.open_(start_steps(start, steps))
        for part in {id(one): one for one in (self, *self.parts())}.values():
            part.__dict__["_attachment"] = attachment
        return self

    def detach(self) -> None:
        """Undoes `attach`. The gates and multipliers stay as they are."""
        if self.attachment is None:
            return
        self.attachment.remove()
        for part in (self, *self.parts()):
            part.__dict__.pop("_attachment", None)


def _as_list(optimizer: Any) -> list[Any]:
    return list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
