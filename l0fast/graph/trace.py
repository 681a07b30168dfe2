"""An exported model: its graph, and which nodes are the calls of which layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from l0fast.graph.tensors import added


@dataclass
class Trace:
    """An exported model: its graph, and which layers' own calls its nodes are.

    Layers are those that can be made smaller.
    """

    nodes: list[Node]
    """Of its graph, in order; of several, one after another."""
    calls: dict[Node, str]
    callers: dict[Node, str]
    """Node -> the innermost module in whose forward it is."""
    inputs: set[Node]
    """The nodes that are the model's own inputs, or those of its parts."""
    read_outside: set[str]
    """Layers whose weights something other than their own call reads."""
    unread: set[str]
    """Layers that run, and whose output reaches no output of the model."""
    held: dict[Node, str] = field(default_factory=dict)
    """Node -> the tensor with a number for each channel that it stands for."""
    tensors: dict[Node, str] = field(default_factory=dict)
    """Node -> the name of the parameter or buffer that it stands for."""
    filled: dict[Node, int] = field(default_factory=dict)
    """Node that fills a new tensor -> the dimension along which an attribute tells its size."""
    recurrent: dict[Node, tuple[str, ...]] = field(default_factory=dict)
    """Recurrent op -> the weights by which it reads its input."""
    parts: tuple[str, ...] = ()
    """The modules whose graphs these are, each for itself; () for the whole model's."""
    counts: Counter[str] = field(init=False)
    """How often each layer is called, and such a tensor read."""
    added: set[str] = field(init=False)
    """Such tensors that do more than multiply."""

    def __post_init__(self) -> None:
        self.counts = self.calls_of() + Counter(self.held.values())
        self.added = added(self.nodes, self.held, self.inputs)

    def calls_of(self) -> Counter[str]:
        """How often each layer is called."""
        return Counter(self.calls.values())

    def in_words(self, node: Node) -> str:
        """What a node is that no op computes."""
        if node in self.inputs:
            return f"the model's input {node.name!r}"
        name = self.tensors.get(node)
        return "a constant" if name is None else f"{name!r}, a tensor of the model"

    @classmethod
    def of_parts(cls, parts: Mapping[str, Trace]) -> Trace:
        """The graphs of several modules, by name, as one."""
        traces = parts.values()
        return cls(
            [node for trace in traces for node in trace.nodes],
            {node: name for trace in traces for node, name in trace.calls.items()},
            {node: name for trace in traces for node, name in trace.callers.items()},
            set().union(*(trace.inputs for trace in traces)),
            set().union(*(trace.read_outside for trace in traces)),
            set().union(*(trace.unread for trace in traces)),
            {node: name for trace in traces for node, name in trace.held.items()},
            {node: name for trace in traces for node, name in trace.tensors.items()},
            {node: dim for trace in traces for node, dim in trace.filled.items()},
            {node: names for trace in traces for node, names in trace.recurrent.items()},
            tuple(parts),
        )
