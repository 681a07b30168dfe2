"""The gate of a whole residual branch: a number that multiplies what the branch adds."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from l0fast import functional
from l0fast.layers.draw import Drawn
from l0fast.layers.hooks import OwnHook, remove_hooks
from l0fast.maths.hard_concrete import HardConcrete

CHILD = "branch"
"""The name that the gate of a branch has in the layer whose output it multiplies."""


class BranchGate(Drawn, nn.Module):
    """One hard-concrete gate on what a residual branch adds: y = x + z * f(x).

    It is a child of the last layer of the branch, whose output it multiplies by a forward hook. It
    is drawn with all other gates of the model. Where z is 0 the branch adds exactly 0.

    Args:
        branch: what the model's graph says of it (see `graph.branches`).
        like: a tensor of the branch's dtype and device.
        group_size: how many parameters the branch has.
        density_init, distribution: as in `Gated`.
    """

    dense_type: ClassVar[type[nn.Module]] = nn.Identity
    gates = "branch"
    noise = "batch"
    units = 1
    all_gates = 1

    def __init__(
        self,
        branch: Any,
        like: Tensor,
        group_size: int,
        density_init: float,
        distribution: HardConcrete | None = None,
    ) -> None:
        super().__init__()
        self.branch, self.group_size = branch, group_size
        self.distribution = functional.checked_distribution(distribution)
        dtype = torch.promote_types(like.dtype, torch.float32)
        start = self.distribution.log_alpha(density_init)
        self.log_alpha = nn.Parameter(torch.full((1,), start, dtype=dtype, device=like.device))

    def forward(self, input: Tensor) -> Tensor:
        """y = z * x, for any shape."""
        return input * self._drawn().to(input.dtype)

    def dense(self) -> nn.Module:
        """What stands in its place in a model without gates."""
        return nn.Identity()

    def remember_size(self) -> None:
        """Its size does not change."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The state of a model without gates on branches loads too: they stay as they are.
        own = {
            prefix + "log_alpha": self.log_alpha.detach(),
            prefix + "_extra_state": self.get_extra_state(),
        }
        lacking = {key: value for key, value in own.items() if key not in state_dict}
        state_dict.update(lacking)
        super()._load_from_state_dict(state_dict, prefix, *args)
        for key in lacking:
            del state_dict[key]

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
