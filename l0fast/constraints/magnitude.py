"""Magnitude pruning with fine-tuning: the baseline that learns no gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.ranking import scores, shared_magnitudes
from l0fast.measures.amounts import Asked
from l0fast.measures.groups import AnyMeasure
from l0fast.pruning.choose import choose

RAMP = (0.1, 0.6)
"""The gradual schedule prunes between these shares of the training."""
AT_ONCE = 0.5
"""The other prunes there."""
EVENTS = 50
"""How often the gradual schedule prunes, about."""
OPEN, CLOSED = 40.0, -40.0
"""log_alpha of a gate that every draw opens, and of one that every draw closes."""


class MagnitudePruning(DensityConstraint):
    """A constraint that is met by closing the gates of the smallest weights, for good.

    Gates are open or closed, and not trained; the call adds nothing to the loss. `step()`, called
    after the optimizer's, prunes when it is time to. Gradually, down to
        target + (1 - target) * (1 - t)^3
    where t goes from 0 to 1 between a tenth and six tenths of the training; or at once, in its
    middle. What is left trains on; a closed gate's weights get no gradient.

    Layers that share their gates are ranked by the mean of their squares.

    Args:
        model, target, measure, example_inputs: as of `DensityConstraint`; with one target, units
            (or single weights) are ranked over all layers (see `scores`), with one for each layer
            within it.
        steps: of the whole training, >= 1.
        gradual: whether units go gradually; else all at once, in the middle of the training.

    Raises:
        ValueError, TypeError: as `DensityConstraint`, and for `steps`.

    Source: Zhu, Gupta, 2017 (the schedule); Han et al., 2015 (pruning, then fine-tuning); Lee et
    al., 2021 (the ranking over layers).
    """

    def __init__(
        self,
        model: nn.Module,
        target: Asked | Mapping[str, Asked],
        *,
        steps: int,
        gradual: bool = True,
        measure: AnyMeasure = "gates",
        example_inputs: Any = None,
    ) -> None:
        _checks.whole("steps", steps)
        super().__init__(model, target, measure=measure, example_inputs=example_inputs)
        self.steps, self.done = steps, 0
        first, last = (int(share * steps) for share in (RAMP if gradual else (AT_ONCE, AT_ONCE)))
        self.first, self.last = max(first, 1), max(last, 1)
        self.every = max((last - first) // EVENTS, 1)
        with torch.no_grad():
            for layer in self.layers.values():
                layer.log_alpha.requires_grad_(False)
                layer.log_alpha.fill_(OPEN)
        self._nothing = torch.zeros((), dtype=self._dtype, device=self._device)

    learns = False
    counts_on_host = True

    def value(self) -> Tensor:
        """0-d: nothing."""
        return self._nothing

    def advance_(self) -> None:
        """Counts, and prunes where the schedule says so.

        Raises:
            RuntimeError: in a CUDA graph's capture. The count is the host's: no replay would move
                it.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{type(self).__name__}: step() counts steps on the host, so a CUDA graph cannot "
                "hold it. Call step() after each replay"
            )
        self.done += 1
        if self.first <= self.done <= self.last:
            left = (self.last - self.done) / max(self.last - self.first, 1)
            if (self.last - self.done) % self.every == 0:
                self.prune_to_(left**3)

    @torch.no_grad()
    def prune_to_(self, share: float) -> None:
        """Closes gates until each density is at most its target + share x (1 - target)."""
        budgets = [
            one._replace(target=one.target + share * (1 - one.target)) for one in self.budgets()
        ]
        # `choose` goes by log_alpha: the ranks, over all layers, of what is still open.
        sizes = {
            name: scores(size.square() * (self.layers[name].log_alpha > 0))
            for name, size in shared_magnitudes(self.layers).items()
        }
        flat = torch.cat([size.flatten() for size in sizes.values()])
        ranks = torch.empty_like(flat)
        ranks[flat.argsort()] = torch.linspace(1.0, OPEN, len(flat)).to(flat)
        parts = ranks.split([size.numel() for size in sizes.values()])
        for name, part in zip(sizes, parts, strict=True):
            log_alpha = self.layers[name].log_alpha
            gates = part.view(log_alpha.shape).to(log_alpha.dtype)
            log_alpha.copy_(gates.where(log_alpha > 0, CLOSED))
        kept = choose(self.layers, budgets)
        for name, layer in self.layers.items():
            opened = kept[name].to(layer.log_alpha.device)
            layer.log_alpha.fill_(CLOSED).masked_fill_(opened, OPEN)

    def lag(self) -> None:
        """Nothing: its gates are decided all along."""

    def get_extra_state(self) -> dict[str, Any]:
        """What `DensityConstraint` holds, and how many steps there have been."""
        return {**super().get_extra_state(), "done": self.done}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes targets and steps over."""
        super().set_extra_state(state)
        self.done = state["done"]
