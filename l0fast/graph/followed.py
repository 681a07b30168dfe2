"""The units of each node of a graph, and why others have none."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from l0fast.graph.nodes import shape_of
from l0fast.graph.tied import Tied
from l0fast.graph.trace import Trace
from l0fast.graph.units import Units, unknown


class Followed(Tied):
    """Units in classes, and where they are in a graph."""

    trace: Trace
    values: dict[Node, Any]
    """Node -> the units of its tensor, or of several."""
    lost: dict[Node, str]
    """Node -> why no unit of a layer is in it."""

    def units(self, node: Node) -> list[Units]:
        """The units of what a node gives: a tensor, or several."""
        value = self.values.get(node, [])
        return value if isinstance(value, list) else [value]

    def _pin_node(self, node: Node, reason: str) -> None:
        for units in self.units(node):
            self.pin(units.labels, reason)

    def _lose(self, node: Node, reason: str) -> None:
        self.lost[node] = reason
        value: Any = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            self.values[node] = [unknown(part.shape) for part in value if isinstance(part, Tensor)]
        elif shape_of(node) is not None:
            self.values[node] = unknown(value.shape)

    def _lost(self, node: Node) -> str:
        """Why an op gives no unit."""
        sources = node.all_input_nodes
        reasons = [self.lost[source] for source in sources if source in self.lost]
        if not any(self.of_layers(part) for source in sources for part in self.units(source)):
            return reasons[0] if reasons else self.in_words(node)
        others = ", with ".join([self.in_words(node), *reasons[:1]])
        return next((why for why in reasons if why.startswith("aten::")), others)

    def _item(self, node: Node) -> None:
        source: Any = node.args[0]
        parts, index = self.units(source), node.args[1]
        if not isinstance(index, int) or not -len(parts) <= index < len(parts):
            self._pin_node(source, "getitem")
            self._lose(node, "getitem")
            return
        self.values[node] = parts[index]
        if source in self.lost:
            self.lost[node] = self.lost[source]
