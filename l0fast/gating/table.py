"""What `sparsify_` would give each layer, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from l0fast._tables import aligned


@dataclass(frozen=True)
class GateRow:
    """What one layer is given, and why."""

    name: str
    kind: str
    """Class of the layer."""
    gates: str
    """"input", "output", "weight", or "" for none."""
    units: int
    """How many units each gate serves."""
    num_gates: int
    reason: str


@dataclass(frozen=True)
class GateTable:
    """What `sparsify_` would do: a row for each layer, and a note; prints as a table."""

    layers: tuple[GateRow, ...]
    note: str = ""
    """Why the structure is not known, where it is not."""

    def __str__(self) -> str:
        rows = [("layer", "kind", "gates", "units each", "number", "reason")]
        for row in self.layers:
            units, gates = (str(row.units), str(row.num_gates)) if row.gates else ("-", "-")
            rows.append((row.name, row.kind, row.gates or "-", units, gates, row.reason))
        lines = aligned(rows, left=len(rows[0]))
        return "\n".join([*lines, self.note] if self.note else lines)
