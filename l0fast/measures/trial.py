"""What a trial of pruning found (see `pruning.trial`): what measures of the pruned model go by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from l0fast.graph.dependencies import GateDependencies
from l0fast.graph.liveness import Liveness
from l0fast.graph.sites import Site
from l0fast.graph.structure import Structure
from l0fast.measures.counts import Counts


@dataclass(frozen=True, eq=False)
class Trial:
    """How `prune` would carry out some closed gates, and what would be left."""

    structure: Structure
    """What the model's graph said."""
    sites: Mapping[str, Site]
    shrinking: tuple[str, ...]
    """The layers that closed gates can make smaller."""
    held: tuple[str, ...]
    """The tensors of other modules that they can make smaller."""
    live: Liveness | None
    """None if each layer is planned by itself."""
    dependencies: GateDependencies
    by_token: GateDependencies
    """The same for what is done for each token: that of a mixture is done by other experts where
    one is gone."""
    kept: Mapping[str, Tensor]
    """Layer -> bool, of log_alpha's shape: the gates that were open."""
    dense: Counts
    """With every gate open."""
    left: Counts
    cut: tuple[Mapping[str, Tensor], Counts] | None
    """The gates that were open, and what was left, where only branches and experts were closed;
    None where none has a gate."""
    shares: Mapping[str, Mapping[str, float]]
    """Measure -> what modules, other than layers, have for each expert, by `share_of`."""
    element_size: int
    """Bytes of one of the model's own numbers."""

    def found(self) -> list[tuple[Mapping[str, Tensor], Counts]]:
        """The gates that were open, and what these left."""
        return [(self.kept, self.left), *([] if self.cut is None else [self.cut])]
