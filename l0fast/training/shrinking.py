"""`TrainerSettings.shrink`: makes the model smaller between two epochs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.calls import Example
from l0fast.pruning.shrink import Idle, Removal, plan_removal, remove_, worthwhile
from l0fast.training.settings import TrainerSettings


@dataclass
class Shrinking:
    """Counts for how many epochs gates have been idle, and removes idle ones with their units."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    """Of the model; its state gets smaller with the model."""
    example: Example
    """Of the inputs of the model's forward."""
    skip: str | bool
    """As in `TrainerSettings`."""
    idle: Idle
    removals: list[Removal] = field(default_factory=list)
    """The removals so far, in order."""

    def remove_idle(self) -> None:
        """Counts one more epoch, and removes gates that were idle for long enough, if it pays."""
        kept = self.idle.count(self.model)
        if worthwhile(kept):
            self._keep_only(kept)

    def remove_closed(self) -> None:
        """Removes the gates that settling has closed for good, even if they are few."""
        self._keep_only(self.idle.count(self.model))

    def _keep_only(self, kept: dict[str, Tensor]) -> None:
        """Removes all that can go if only the gates in `kept` may open again."""
        removal, stuck = plan_removal(self.model, self.example, kept)
        self.idle.stuck |= stuck
        if removal is not None:
            self._apply(removal)

    def _apply(self, removal: Removal) -> None:
        remove_(self.model, removal, self.example, self.skip, self.optimizer)
        self.removals.append(removal)
        self.idle.follow(removal)

    def as_entries(self) -> dict[str, Any]:
        """The entries of a checkpoint that `load_` takes."""
        removals = [removal.as_json() for removal in self.removals]
        return {"removals": removals or None, "idle": self.idle.as_json()}

    def load_(self, removals: list[dict[str, Any]] | None, idle: Mapping[str, Any] | None) -> None:
        """Repeats the removals of a checkpoint on the model as it was before the training."""
        for entry in removals or []:
            self._apply(Removal.from_json(entry))
        if idle is not None:
            self.idle.set(idle)


def make_shrinking(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: TrainerSettings,
    example_inputs: Any,
) -> Shrinking | None:
    """The `Shrinking` of a run with these settings; None if they do not ask for it."""
    if settings.shrink is None:
        return None
    return Shrinking(
        model, optimizer, Example.of(example_inputs, model), settings.skip, Idle(settings.shrink)
    )
