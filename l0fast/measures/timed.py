"""What the pruned model will take, in seconds, by a table of its layers' latencies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.measures.counts import Counts
from l0fast.measures.footprint import Footprint
from l0fast.measures.groups import Group
from l0fast.measures.latency import Grids
from l0fast.measures.trial import Trial


class Latency(Footprint):
    """Seconds that a table gives for the widths; the whole model's with the table's rest."""

    slack = 1e-9
    in_grid: Tensor
    out_grid: Tensor
    seconds: Tensor

    def _sizes(self, tried: Trial) -> dict[str, Tensor]:
        self.dense = tried.dense
        return self._tabled()

    def _tabled(self) -> dict[str, Tensor]:
        """What the groups' table says."""
        table: Any = self.groups[0].measure
        for name in self.names:
            size, known = self.dense.widths[name], table.layers.get(name)
            if known is None or size != (known.inputs[-1], known.outputs[-1]):
                expected = f"one of this model, with {name!r} of size {size} (see measure_latency)"
                got = f"a latency table of {len(table.layers)} layers"
                _checks.refuse("measure", got, expected)
        # As they are in the table, whatever the dtype that a constraint computes in.
        self.exact = grids = Grids.of([table.layers[name] for name in self.names])
        return {
            "in_grid": grids.inputs,
            "out_grid": grids.outputs,
            "seconds": grids.seconds,
            "member": self._inside(self.names).double(),
            "beside": torch.zeros(len(self.groups), len(self.parts), dtype=torch.float64),
            "rest": torch.tensor(self._rest(), dtype=torch.float64),
            "total": torch.tensor(self.left(self.dense), dtype=torch.float64),
        }

    def take(self, groups: list[Group]) -> None:
        """Goes on with the same groups by another table."""
        self.groups = groups
        for name, tensor in self._tabled().items():
            self._buffers[name] = tensor.to(self.total)
        self.totals = self.left(self.dense)

    def _rest(self) -> list[float]:
        """[C] what each group has besides its layers."""
        rest: float = self.groups[0].measure.rest  # type: ignore[union-attr]
        return [0.0 if group.whole is None else rest for group in self.groups]

    def left(self, counts: Counts) -> list[float]:
        known = [counts.widths.get(name, (0, 0)) for name in self.names]
        widths = torch.tensor(known, dtype=torch.float64)
        there = self._inside(self.names) * (widths[:, 0] > 0)  # a branch that is gone has none
        seconds = (there * self.exact.at(*widths.unbind(1))).sum(1).tolist()
        return [layers + rest for layers, rest in zip(seconds, self._rest(), strict=True)]

    def _layer_costs(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return Grids(self.in_grid, self.out_grid, self.seconds).at(inputs, outputs)
