"""How dense a model is: expected and realised, by layer and in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from l0fast._tables import aligned
from l0fast.layers.handle import gates
from l0fast.measures.flops import count_macs


@dataclass(frozen=True)
class LayerDensity:
    """A row of the table: one gated layer, or all of them."""

    name: str
    gates: str
    open_gates: int
    num_gates: int
    expected: float
    """Expected L0 / gated parameters."""
    realised: float
    """The same with the evaluation gates: parameters of open gates / gated parameters."""
    params: int
    """Gated parameters."""
    macs: int | None
    """Multiply-accumulates of the layer, all gates open, for the examples given."""


@dataclass(frozen=True)
class DensityTable:
    """What `density` returns: a row for each gated layer, and one for all; prints as a table."""

    layers: tuple[LayerDensity, ...]
    total: LayerDensity

    def __str__(self) -> str:
        head = ("layer", "gates", "open", "of", "expected", "realised", "params", "MACs")
        rows: list[tuple[str, ...]] = [head]
        for row in (*self.layers, self.total):
            macs = "-" if row.macs is None else f"{row.macs:,}"
            densities = f"{row.expected:.4f}", f"{row.realised:.4f}"
            counts = str(row.open_gates), str(row.num_gates)
            rows.append((row.name, row.gates, *counts, *densities, f"{row.params:,}", macs))
        return "\n".join(aligned(rows, left=2))


def density(model: nn.Module, example_inputs: Any = None) -> DensityTable:
    """The density of a model with gates, of each layer and in all, as a table.

    Args:
        model: a model with gates.
        example_inputs: what its forward takes: a tensor, a tuple of positional arguments, or a dict
            of keyword arguments. If it is given, the table has MACs.

    Returns:
        DensityTable(layers, total), which prints as a table.

    Raises:
        ValueError: the model has no gates, or does not take the example.

    >>> model = l0fast.sparsify_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    >>> print(l0fast.density(model, torch.randn(2, 8)))
    layer  gates  open  of  expected  realised  params  MACs
    0      input     8   8    0.9000    1.0000     128   256
    2      input    16  16    0.9000    1.0000      64   128
    total           24  24    0.9000    1.0000     192   384
    """
    layers = gates(model).layers
    macs = None if example_inputs is None else count_macs(model, example_inputs)
    rows: list[LayerDensity] = []
    with torch.no_grad():
        for name, layer in layers.items():
            opened = layer.own(layer.open_probability())
            open_gates = int(layer.own(layer.evaluation_gates() > 0).sum())
            rows.append(
                LayerDensity(
                    name=name,
                    gates=layer.gates,
                    open_gates=open_gates,
                    num_gates=layer.all_gates,
                    expected=float(opened.double().sum()) / layer.all_gates,
                    realised=open_gates / layer.all_gates,
                    params=layer.all_gates * layer.group_size,
                    macs=None if macs is None else macs[name],
                )
            )
    params = sum(row.params for row in rows)
    total = LayerDensity(
        name="total",
        gates="",
        open_gates=sum(row.open_gates for row in rows),
        num_gates=sum(row.num_gates for row in rows),
        expected=sum(row.expected * row.params for row in rows) / params,
        realised=sum(row.realised * row.params for row in rows) / params,
        params=params,
        macs=None if macs is None else sum(row.macs or 0 for row in rows),
    )
    return DensityTable(tuple(rows), total)
