"""The gate of a whole residual branch: a number that multiplies what the branch adds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from l0fast.layers.hooks import OwnHook, remove_hooks
from l0fast.layers.part import PartGate
from l0fast.maths.hard_concrete import HardConcrete

CHILD = "branch"
"""The name that the gate of a branch has in the layer whose output it multiplies."""


class BranchGate(PartGate):
    """One hard-concrete gate on what a residual branch adds: y = x + z * f(x).

    It is a child of the last layer of the branch, whose output it multiplies by a forward hook.
    Where z is 0 the branch adds exactly 0.

    Args:
        branch: what the model's graph says of it (see `graph.branches`).
        like, group_size, density_init, distribution: as in `PartGate`.
    """

    gates = "branch"
    least = 0

    def __init__(
        self,
        branch: Any,
        like: Tensor,
        group_size: int,
        density_init: float,
        distribution: HardConcrete | None = None,
    ) -> None:
        super().__init__(1, like, group_size, density_init, distribution)
        self.branch = branch

    def forward(self, input: Tensor) -> Tensor:
        """y = z * x, for any shape."""
        return input * self._drawn().to(input)

    def extra_repr(self) -> str:
        return f"on {self.branch.name!r}"


class _Apply(OwnHook):
    """Forward hook of a branch's last layer: multiplies its output by the gate."""

    def __call__(self, module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        gate = module._modules[CHILD]
        assert gate is not None
        return gate(output)


def put_branch(host: nn.Module, gate: BranchGate) -> None:
    """Makes a gate multiply what a layer gives."""
    host.add_module(CHILD, gate.train(host.training))
    host.register_forward_hook(_Apply())


def take_branches(model: nn.Module) -> None:
    """Takes the gates of branches, or what stands in their place, off a model."""
    for module in list(model.modules()):
        if any(isinstance(hook, _Apply) for hook in module._forward_hooks.values()):
            remove_hooks(module, lambda hook: isinstance(hook, _Apply))
            del module._modules[CHILD]


def has_branch(layer: nn.Module) -> bool:
    """Whether a layer's output is multiplied by the gate of a branch."""
    return isinstance(layer._modules.get(CHILD), BranchGate)


def branch_gates(layers: Any) -> dict[str, BranchGate]:
    """Those of some layers with gates that are gates of branches, by name."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, BranchGate)}
