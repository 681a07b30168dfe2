"""The gates of a model as pruning takes them: their values in evaluation, and which stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from l0fast.layers.gated import Gated
from l0fast.layers.stages import OPEN


@dataclass(frozen=True)
class GateValues:
    """The gates of a model in evaluation, with those that do not stay closed."""

    layers: Mapping[str, Gated]
    kept: Mapping[str, Tensor]
    """Layer -> bool, of log_alpha's shape: the gates that stay."""
    fully_open: bool = False
    """Whether a gate that stays is 1, whatever its log_alpha; as at the start of a training."""

    def of(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """z of one layer, of log_alpha's shape."""
        layer = self.layers[name]
        log_alpha = layer.log_alpha.detach().to(dtype or layer.log_alpha.dtype)
        kept = self.kept[name].to(log_alpha.device)
        if self.fully_open or layer.stage == OPEN:
            return kept.to(log_alpha.dtype)
        return layer.distribution.median(log_alpha).masked_fill(~kept, 0.0)

    def on_units(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """z for each unit that the layer's gates serve."""
        layer = self.layers[name]
        return layer.spread(self.of(name, dtype).to(dtype or layer.weight.dtype))


def all_gates(layers: Mapping[str, Gated]) -> dict[str, Tensor]:
    """Layer -> bool, of log_alpha's shape: every gate."""
    return {
        name: torch.ones(layer.log_alpha.shape, dtype=torch.bool) for name, layer in layers.items()
    }
