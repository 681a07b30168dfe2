"""Several constraints on one model, called and stepped as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.constraints.attach import Attachable
from l0fast.constraints.constraint import DensityConstraint
from l0fast.constraints.dual import EqualityAscent
from l0fast.constraints.settle import settle_, warn_of
from l0fast.constraints.term import refuse_others
from l0fast.layers.gated import Gated
from l0fast.layers.handle import ModelGates
from l0fast.measures.amounts import Asked
from l0fast.measures.groups import Asking, Group, measure_name


def _least(layer: Gated) -> float:
    """The parameters that a layer is expected to have with all its gates at their lower bound."""
    of = layer.distribution
    return layer.num_gates * layer.group_size / (1 + math.exp(of.bound - of.shift))


def _check_reachable(equal: DensityConstraint, other: DensityConstraint) -> None:
    """Refuses densities to be reached that the targets of another constraint forbid."""
    if equal.measure != "gates" or other.measure != "gates":
        return
    size = {name: layer.num_gates * layer.group_size for name, layer in equal.layers.items()}
    for name, wanted in equal.targets.items():
        inside = set(equal.groups[name].layers)
        most = free = sum(size[layer] for layer in inside)
        for group, target in zip(other.groups.values(), other.targets.values(), strict=True):
            shared = sum(size[layer] for layer in group.layers if layer in inside)
            outside = [equal.layers[layer] for layer in group.layers if layer not in inside]
            least = sum(_least(layer) for layer in outside)
            most -= shared
            most += min(shared, target * sum(size[layer] for layer in group.layers) - least)
        if wanted > most / free:
            expected = f"at most {most / free:.6g}, as {other} leaves no more"
            _checks.refuse(f"constraints: density of {name!r}", wanted, expected)


class Constraints(Attachable, nn.Module):
    """Several constraints on one model, used as one.

    Attach it to the optimizer, or add its call to the loss.

    Equals:
        sum(constraint() for constraint in constraints)
    `step()` moves the multipliers of all. `prune` holds every target, each by its own measure.

    Args:
        constraints: of the class `DensityConstraint`, with different measures or on different
            layers.

    Attributes:
        constraints: the constraints in their order, each with its multipliers.

    Raises:
        ValueError, TypeError: no constraint, constraints on different models, two on the same
            layers by the same measure, or two that cannot both hold. Upper bounds hold together
            if each can hold alone (see `DensityConstraint`). With `EqualityAscent`, a density may
            be out of reach under another constraint's targets. For measure="gates" each pair of
            constraints is checked for that; other measures, and three or more at once, are not.

    >>> model = l0fast.sparsify_(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)))
    >>> first = l0fast.DensityConstraint(model, {"0": 0.5})
    >>> second = l0fast.DensityConstraint(model, {"2": 0.25})
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> constraint = l0fast.Constraints([first, second]).attach(optimizer, steps=1000)
    """

    def __init__(self, constraints: Iterable[DensityConstraint]) -> None:
        super().__init__()
        terms = list(constraints)
        expected = "one or more DensityConstraints"
        for term in terms:
            if not isinstance(term, DensityConstraint):
                _checks.refuse("constraints", type(term).__name__, expected, TypeError)
        if not terms:
            _checks.refuse("constraints", terms, expected)
        first = list(terms[0].layers.values())
        if any(list(term.layers.values()) != first for term in terms):
            _checks.refuse("constraints", "several models", "constraints on one and the same model")
        groups = [group for term in terms for group in term.groups.values()]
        for group in groups:
            if groups.count(group) > 1:
                words = f"two on {group.layers} by {measure_name(group.measure)}"
                _checks.refuse("constraints", words, "one target for each set of layers a measure")
        for term in terms:
            for other in terms:
                if isinstance(term.dual, EqualityAscent) and other is not term:
                    _check_reachable(term, other)
        self.constraints = nn.ModuleList(terms)
        if opened := max(term.open_left for term in terms):
            self.open_(opened)  # a constraint that has no steps ends the start of the others

    @property
    def _terms(self) -> list[DensityConstraint]:
        return list(self.constraints)  # pyright: ignore[reportReturnType]

    @property
    def layers(self) -> dict[str, Gated]:
        """Name -> gated layer of the model."""
        return self._terms[0].layers

    def parts(self) -> list[Asking]:
        """The constraints."""
        return [*self._terms]

    def asked(self) -> dict[str, tuple[Group, Asked]]:
        """What each target is about, and the target."""
        found = [one for term in self._terms for one in term.asked().values()]
        return {str(place): one for place, one in enumerate(found)}

    @property
    def handle(self) -> ModelGates:
        """Of the model."""
        return self._terms[0].handle

    @property
    def steps(self) -> int | None:
        """Of the whole training, if the constraints know it."""
        return max((term.steps for term in self._terms if term.steps), default=None)

    def lags(self) -> list[float]:
        """How far each density is above its target in force."""
        return [lag for term in self._terms for lag in term.lags()]

    def begin_(self) -> None:
        """Lets the targets come down from the densities that the model has now."""
        for term in self._terms:
            term.begin_()

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Refuses the state of constraints on something else."""
        for index, term in enumerate(self._terms):
            term.check_state(state_dict, f"{prefix}constraints.{index}.")

    def value(self) -> Tensor:
        """0-d: the sum of the constraints' terms."""
        return torch.stack([term.value() for term in self._terms]).sum()

    def advance_(self) -> None:
        """Moves all multipliers and puts every log_alpha back into its bounds."""
        for term in self._terms:
            term.ascend_()
        self._terms[0].project_()

    @property
    def settled(self) -> bool:
        """Whether the gates are decided (see `settle`)."""
        return self._terms[0].settled

    def settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Decides all gates by all targets together (see `DensityConstraint.settle`)."""
        refuse_others(self._terms)
        self.end_start_()
        for term in self._terms:
            warn_of(term.lag())
        settle_(
            self.handle,
            [one for term in self._terms for one in term.budgets()],
            optimizer,
        )
        for term in self._terms:
            term.reset_multipliers_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)  # all of them before the first is changed
        super()._load_from_state_dict(state_dict, prefix, *args)
