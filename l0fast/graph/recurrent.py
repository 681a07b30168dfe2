"""PyTorch's RNN, GRU and LSTM: they lose the weights of inputs that are gone, and no outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.fx import Node
from torch.utils._pytree import tree_leaves

from l0fast.graph.nodes import op_name

RECURRENT = {f"aten::{kind}" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
"""Ops that are whole layers."""
INPUT_WEIGHTS = ("weight_ih_l0", "weight_ih_l0_reverse")
"""Names of the weights of the input, one for each direction."""


def input_weights(node: Node) -> list[Node]:
    """The weights by which a recurrent op reads its input; none for another op, and for packed
    sequences."""
    if op_name(node) not in RECURRENT or getattr(node.target, "_overloadname", "") != "input":
        return []
    weights: Any = node.args[2]
    layers, directions = node.args[4], 1 + bool(node.args[7])
    each = len(weights) // (layers * directions)  # type: ignore[operator]
    return [weights[each * direction] for direction in range(directions)]


def beside_input(node: Node) -> list[Node]:
    """The initial states and the weights of a recurrent op."""
    return [one for one in tree_leaves(node.args[1:3]) if isinstance(one, Node)]


def readers(nodes: Iterable[Node], held: Mapping[Node, str]) -> dict[Node, tuple[str, ...]]:
    """Recurrent op -> the names of its input weights, where all of them may get smaller.

    Args:
        nodes: of a graph.
        held: those that stand for tensors which may get smaller -> their names.
    """
    found = {node: input_weights(node) for node in nodes}
    return {
        node: tuple(held[weight] for weight in weights)
        for node, weights in found.items()
        if weights and all(weight in held for weight in weights)
    }
