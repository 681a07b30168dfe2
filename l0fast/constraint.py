"""The constraint and the penalty: modules whose call is the term to add to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.density import (
    WHOLE_MODEL,
    expected_densities,
    gated_parameters,
    group_weights,
    require_gated,
    target_groups,
)
from l0fast.dual import DualAscent
from l0fast.layers import Gated
from l0fast.sparsify import unwrapped

TARGETS = "_l0fast_targets"
"""Attribute of a constrained model: layer names -> target, so that `prune` holds them."""


class _DensityTerm(nn.Module):
    """Expected densities of groups of a model's gated layers, and the projection after a step."""

    weights: Tensor

    def __init__(self, model: nn.Module, groups: list[tuple[str, ...]]) -> None:
        super().__init__()
        layers = require_gated(unwrapped(model))
        # The layers belong to the model: kept out of this module's children and state.
        self.__dict__["_layers"] = layers
        anchor = next(iter(layers.values())).log_alpha
        self._dtype = torch.promote_types(anchor.dtype, torch.float32)
        weights = group_weights(groups, layers).to(anchor.device, self._dtype)
        self.register_buffer("weights", weights, persistent=False)
        self._bounds = [layer.distribution.bound for layer in layers.values()]
        self._lower = [-bound for bound in self._bounds]

    @property
    def layers(self) -> dict[str, Gated]:
        """Name -> gated layer of the model."""
        return self.__dict__["_layers"]

    def densities(self) -> Tensor:
        """[C] expected densities, differentiable."""
        device = next(iter(self.layers.values())).log_alpha.device
        if self.weights.device != device:
            self.to(device)  # the model has moved
        return expected_densities(self.layers, self.weights)

    @torch.no_grad()
    def project_(self) -> None:
        """Puts every log_alpha back into its bounds."""
        gates: list[Tensor] = [layer.log_alpha for layer in self.layers.values()]
        torch._foreach_clamp_min_(gates, self._lower)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_clamp_max_(gates, self._bounds)  # pyright: ignore[reportPrivateImportUsage]


class DensityConstraint(_DensityTerm):
    """The Lagrangian term of "density at most `target`": add its call to the loss.

    Equals:
        (multiplier * (densities - target)).sum()
    and `step()`, called after the optimizer's, moves the multipliers (see `DualAscent`) by the
    violation seen in the last call, with no autograd and no host sync. `prune` holds the pruned
    model to the same targets.

    Args:
        model: a model with gates.
        target: the density asked for, in (0, 1]: a number for the whole model, or layer name or
            glob pattern -> number, each key its own constraint.
        measure: "gates": expected L0 / gated parameters (the paper's density).
        dual: how the multipliers move; DualAscent() by default.

    Attributes:
        multiplier, target, violation: [C] tensors, one entry a constraint, in `names`' order.
        restarts: [C] number of dual restarts so far.
        dual_lr: 0-d tensor; may be changed during training.

    Raises:
        ValueError, TypeError: an unknown layer, or a target that cannot be met (the message has
            the range that can).

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021.
    """

    multiplier: Tensor
    target: Tensor
    _left_on_model: dict[tuple[str, ...], float]
    violation: Tensor
    restarts: Tensor
    dual_lr: Tensor

    def __init__(
        self,
        model: nn.Module,
        target: float | Mapping[str, float],
        *,
        measure: str = "gates",
        dual: DualAscent | None = None,
    ) -> None:
        _checks.one_of("measure", measure, ("gates",))
        model = unwrapped(model)
        groups = target_groups(model, target)
        super().__init__(model, [names for names, _ in groups.values()])
        self.dual = dual or DualAscent()
        self.groups = {name: names for name, (names, _) in groups.items()}
        targets = [value for _, value in groups.values()]
        place: dict[str, Any] = {"dtype": self._dtype, "device": self.weights.device}
        self.register_buffer("multiplier", torch.zeros(len(groups), **place))
        self.register_buffer("target", torch.tensor(targets, **place))
        self.register_buffer("violation", torch.zeros(len(groups), **place))
        self.register_buffer("restarts", torch.zeros(len(groups), **place))
        self.register_buffer("dual_lr", torch.tensor(self.dual.lr, **place))
        # The dict itself, for targets that a loaded state brings.
        self.__dict__["_left_on_model"] = model.__dict__.setdefault(TARGETS, {})
        self._exact: list[float] = []
        self._set_targets(targets)

    def _set_targets(self, targets: list[float]) -> None:
        """Leaves the targets on the model, as they were named: `target` holds them rounded."""
        self._exact = targets
        self._left_on_model.update(zip(self.groups.values(), targets, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the constraints, in the order of their multipliers."""
        return tuple(self.groups)

    def forward(self) -> Tensor:
        """0-d: multiplier * (density - target), summed over the constraints."""
        violation = self.densities() - self.target
        self._buffers["violation"] = violation.detach()  # past setattr: this is each step's cost
        return torch.dot(self.multiplier, violation)

    def step(self) -> None:
        """Moves the multipliers and puts every log_alpha back into its bounds."""
        self.dual.step_(self.multiplier, self.violation, self.dual_lr, self.restarts)
        self.project_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any
    ) -> None:
        saved = state_dict.get(prefix + "_extra_state", {}).get("groups")
        ours = self.get_extra_state()["groups"]
        if saved is not None and saved != ours:
            words = [
                ", ".join(f"{n} ({' '.join(of)})" for n, of in groups) for groups in (saved, ours)
            ]
            _checks.refuse("state_dict", f"constraints on {words[0]}", f"constraints on {words[1]}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def get_extra_state(self) -> dict[str, Any]:
        """What the state holds beside tensors: the layers of each constraint, and the targets."""
        groups = [[name, list(layers)] for name, layers in self.groups.items()]
        return {"groups": groups, "targets": list(self._exact)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the targets over, for `prune` too."""
        self._set_targets(list(state["targets"]))

    def extra_repr(self) -> str:
        pairs = zip(self.names, self._exact, strict=True)
        return ", ".join(f"{name} <= {target:g}" for name, target in pairs)


class L0Penalty(_DensityTerm):
    """The penalised baseline: add its call to the loss.

    Equals, without `num_examples` (the normalised unit):
        coefficient * density
    with it (the unit of Louizos et al., whose loss is a mean over N examples):
        coefficient / num_examples * expected_L0

    Args:
        model: a model with gates.
        coefficient: lambda, >= 0; 0.1 with num_examples=60000 on the MLP 784-300-100 is 0.44
            without.
        num_examples: N of the training set, >= 1, or None.

    Raises:
        ValueError, TypeError: a number is out of its range, or the model has no gates.

    Source: Louizos et al., 2018.
    """

    coefficient: Tensor

    def __init__(
        self, model: nn.Module, coefficient: float, num_examples: int | None = None
    ) -> None:
        coefficient = _checks.number("coefficient", coefficient, "a number >= 0", low=0.0)
        layers = require_gated(unwrapped(model))
        super().__init__(model, [tuple(layers)])
        if num_examples is not None:
            _checks.whole("num_examples", num_examples)
            coefficient *= gated_parameters(list(layers.values())) / num_examples
        place: dict[str, Any] = {"dtype": self._dtype, "device": self.weights.device}
        self.register_buffer("coefficient", torch.tensor(coefficient, **place))
        self.names = (WHOLE_MODEL,)

    def forward(self) -> Tensor:
        """0-d: coefficient * density."""
        return self.coefficient * self.densities().squeeze(0)

    def step(self) -> None:
        """Puts every log_alpha back into its bounds; there is no multiplier to move."""
        self.project_()
