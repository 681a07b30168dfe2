"""Shared by the callbacks: a constraint, or the options to make one when the training begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast.constraints.attach import Attachable
from l0fast.constraints.attachment import Attachment
from l0fast.constraints.constraint import DensityConstraint
from l0fast.graph.calls import unwrapped
from l0fast.layers.handle import handles_in, refuse_adapters


class Recipe:
    """A constraint that a callback attaches to its trainer's optimizer.

    Args:
        constraint: a constraint on the model. None makes `DensityConstraint(model, **options)` when
            the training begins, as the number of steps is known then.
        options: of the constraint; at least `target`.
        attach: options of `attach`: settle, start, gate_lr.

    Raises:
        ValueError, TypeError: there is neither a constraint nor a target, or both.
    """

    def __init__(self, constraint: Any, options: dict[str, Any], attach: dict[str, Any]) -> None:
        if constraint is not None and not isinstance(constraint, Attachable):
            got, expected = type(constraint).__name__, "a constraint, or target=... in its place"
            _checks.refuse("constraint", got, expected, TypeError)
        if (constraint is None) == ("target" not in options):
            got = "neither" if constraint is None else "both"
            _checks.refuse("constraint, target", got, "one of the two")
        self.constraint: Any = constraint
        self._options, self._attach = options, attach
        self._attachment: Attachment | None = None

    def begin(self, model: nn.Module, optimizers: list[Any], steps: int) -> Attachment:
        """Attaches the constraint of this training; makes it first if none was given."""
        refuse_adapters("attach", model)
        # A training that was interrupted has left it attached to its own optimizer.
        if self._attachment is not None and self.constraint.attachment is self._attachment:
            self.constraint.detach()
        if self._options:
            # The gates may be on a part of the model, such as the network in a LightningModule.
            parts = list(handles_in(unwrapped(model)))
            if len(parts) == 1:
                model = unwrapped(model).get_submodule(parts[0])
            self.constraint = DensityConstraint(model, **self._options, steps=steps)
        attached: Attachment | None = self.constraint.attachment
        if attached is None:
            attached = self.constraint.attach(optimizers, steps=steps, **self._attach).attachment
        assert attached is not None
        self._attachment = attached
        return attached

    def end(self) -> None:
        """Detaches the constraint from the optimizers. It stays on the model, for `prune`."""
        if self.constraint is not None:
            self.constraint.detach()
        self._attachment = None

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """The expected densities and multipliers, by name."""
        found: dict[str, float] = {}
        for part in self.constraint.parts():
            if isinstance(part, DensityConstraint):
                multipliers = part.multiplier.tolist()
                for name, density, own in zip(
                    part.names, part.densities().tolist(), multipliers, strict=True
                ):
                    found[f"l0_density/{name}"], found[f"l0_multiplier/{name}"] = density, own
        return found


def given(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {name: value for name, value in options.items() if value is not None}
