"""The gates' step of an attached training by one launch, where that is possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from l0fast.autograd import runs_at_once
from l0fast.constraints.gate_adam import GateAdam
from l0fast.constraints.processes import mesh_of


def moved_at_once(
    term: Any,
    adam: GateAdam,
    gates: list[Tensor],
    grads: Sequence[Tensor | None],
    scale: Tensor | None,
) -> bool:
    """Moves gates by the loss's gradient and the constraint's, by one launch; called without
    autograd.

    Args:
        term: what is attached.
        adam: of the gates.
        gates: of the model.
        grads: the loss's gradients.
        scale: 0-d, by which they are too large; or None.

    Returns:
        Whether it was possible: on a GPU, for one constraint on layers with gates of their own.
    """
    layers = list(term.handle.layers.values())
    if len(layers) != len(gates) or not runs_at_once(gates, grads):
        return False
    if list(term.layers.values()) != layers:  # some got their gates after the term was made
        return False
    of = layers[0].distribution
    if any(one.gate_index is not None or one.distribution != of for one in layers):
        return False
    if not all(gate.requires_grad for gate in gates):
        return False
    if mesh_of(term.handle.layers) is not None:  # gradients are averaged first
        return False
    pull = None
    if not term.settled:
        pull = term.pull()
        if pull is None:
            return False
    moved = adam.step_at_once(gates, grads, scale, of, pull)
    if moved is None:
        return False
    if moved[0] is not None:
        term._buffers["violation"] = moved[0]
    return True
