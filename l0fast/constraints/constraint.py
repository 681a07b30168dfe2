"""The constraint and the penalty: modules whose call is the term to add to the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.constraints.budget import Budget
from l0fast.constraints.dual import Dual, DualAscent
from l0fast.constraints.schedule import TargetSchedule
from l0fast.constraints.settle import hold_, is_settled, mark_, settle_
from l0fast.gating.sparsify import example_args, unwrapped
from l0fast.layers.draw import own_gates
from l0fast.layers.gated import Gated
from l0fast.measures.amounts import Asked, share
from l0fast.measures.density import (
    WHOLE_MODEL,
    AnyMeasure,
    Group,
    gated_parameters,
    measure_name,
    require_gated,
    target_groups,
)
from l0fast.measures.footprint import Latency, measure_of
from l0fast.measures.latency import LatencyTable
from l0fast.measures.measure import Measure, is_of_pruned
from l0fast.measures.timing import settled
from l0fast.measures.trial import trial

TARGETS = "_l0fast_targets"
"""Attribute of a constrained model: `Group` -> target, so that `prune` holds them."""


class _DensityTerm(nn.Module):
    """Expected densities of groups of a model's gated layers, and the projection after a step."""

    def __init__(self, model: nn.Module, groups: list[Group], example_inputs: Any = None) -> None:
        super().__init__()
        layers = require_gated(model)
        sized = is_of_pruned(groups[0].measure)
        tried = trial(model, example_args(example_inputs)) if sized else None
        measure = measure_of(layers, groups, tried)
        # The layers belong to the model: kept out of this module's children and state.
        self.__dict__.update(_layers=layers, _measure=measure)
        anchor = next(iter(layers.values())).log_alpha
        self._dtype = torch.promote_types(anchor.dtype, torch.float32)
        self._device = anchor.device
        self._lowest = measure.lowest()
        measure.to(self._device, self._dtype)
        self._owning = own_gates(layers)
        self._bounds = [layers[name].distribution.bound for name in self._owning]
        self._lower = [-bound for bound in self._bounds]
        mark_(layers.values(), False)  # whatever was trained before starts with noise again

    @property
    def settled(self) -> bool:
        """Whether the gates are decided (see `settle`)."""
        return is_settled(self.layers.values())

    def settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Decides all gates, for the last part of a training; call it once, between two steps.

        As many gates are kept as the targets allow, in the order of their open probability; each
        has its mean under noise from then on, is trained on without noise, and stays open. The
        others are closed for good. The call adds nothing to the loss any more. What is trained
        then is what `prune` gives. The state says so: load it after a fresh start, and the training
        goes on without noise.

        Args:
            optimizer: the one of the gates; it loses its moments of every log_alpha.

        Raises:
            ValueError, TypeError: the targets do not hold one unit of each layer, or `optimizer`
                is none.
        """
        settle_(self.layers, self.budgets(), optimizer)

    def budgets(self) -> list[Budget]:
        """The targets."""
        return []

    def get_extra_state(self) -> dict[str, Any]:
        """What the state holds beside tensors: whether the gates are decided."""
        return {"settled": self.settled}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes it over, for the model's layers."""
        mark_(self.layers.values(), state.get("settled", False))

    @property
    def layers(self) -> dict[str, Gated]:
        """Name -> gated layer of the model."""
        return self.__dict__["_layers"]

    def densities(self) -> Tensor:
        """[C] expected densities, differentiable; of what is kept, once it is settled."""
        measure: Measure = self.__dict__["_measure"]
        device = next(iter(self.layers.values())).log_alpha.device
        if self._device != device:  # the model has moved
            self._device = device
            self.to(device)
            measure.to(device)
        if self.settled:
            return torch.tensor(self._shares(), dtype=self._dtype, device=device)
        return measure()

    @torch.no_grad()
    def _shares(self) -> list[float]:
        """[C] densities with the gates as they are in evaluation."""
        measure: Measure = self.__dict__["_measure"]
        opened = {name: layer.evaluation_gates() > 0 for name, layer in self.layers.items()}
        spent = zip(measure.spent(opened), measure.totals, strict=True)
        return [cost / total for cost, total in spent]

    @torch.no_grad()
    def project_(self) -> None:
        """Puts every log_alpha back into its bounds."""
        if self.settled:
            for name in self._owning:
                hold_(self.layers[name].log_alpha, self.layers[name].distribution)
            return
        gates: list[Tensor] = [self.layers[name].log_alpha for name in self._owning]
        if self._device.type == "cpu":  # which runs a foreach tensor by tensor, and here twice
            for log_alpha, bound in zip(gates, self._bounds, strict=True):
                log_alpha.clamp_(-bound, bound)
            return
        torch._foreach_clamp_min_(gates, self._lower)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_clamp_max_(gates, self._bounds)  # pyright: ignore[reportPrivateImportUsage]


def _in_words(state: Mapping[str, Any]) -> str:
    """What the extra state of a constraint says it is of."""
    groups = ", ".join(f"{name} ({' '.join(layers)})" for name, layers in state["groups"])
    # States of before there was another dual do not name theirs.
    dual = state.get("dual", DualAscent.__name__)
    scheduled = " with a schedule" if state.get("scheduled") else ""
    return f"constraints on {groups} by {state['measure']}, moved by {dual}{scheduled}"


class DensityConstraint(_DensityTerm):
    """The Lagrangian term of "density at most `target`": add its call to the loss.

    Equals, by default (see `dual`):
        (multiplier * (densities - target)).sum()
    and `step()`, called after the optimizer's, moves the multipliers (see `DualAscent`) by the
    violation seen in the last call, with no autograd and no host sync. `prune` holds the pruned
    model to the same targets.

    Args:
        model: a model with gates.
        target: the density asked for, in (0, 1]: a number for the whole model, or layer name or
            glob pattern -> number, each key its own constraint. In place of any number an amount,
            as text with the unit of the measure: "100k gates", "100k params", "5M MACs", "1 MB"
            (10^6 bytes), "2 ms", "3.5 cost" (of your own).
        measure: what the target is a share or an amount of:
            "gates": the gated parameters, as expected L0 counts them (the paper's density).
            "params", "macs": what the pruned model will have, over what the dense one has: the
            whole model's, or of the layers that a key names. A unit goes with its gate, its
            maker's or its readers', and takes their weights with it. MACs are those of one forward
            of the example; the model's have its products of matrices, such as attention's, too.
            "memory": activations, in bytes: what Linears, convolutions, batch norms and products
            of matrices give in one forward of the example.
            "latency": seconds for one forward of the example, by a table of each layer at several
            widths, which is measured now, on the model's device (see `measure_latency`). Or a
            `LatencyTable`, measured before or elsewhere.
            What `prune` holds is the table's prediction. The state has the table.
            A callable: a cost of your own, over the cost with every gate open. It is given
            layer name -> open probabilities (of log_alpha's shape) and returns a 0-d tensor,
            differentiable, which must not fall when a probability rises; only with one number
            as target.
        example_inputs: what the model's forward takes (a tuple for several arguments); needed by
            all measures of the pruned model, to see which layer feeds which.
        dual: how the multipliers move: `DualAscent` (the default), `PIControl`,
            `AugmentedLagrangian` or `EqualityAscent`.
        schedule: how the targets come down to what is asked; None: they are in force from the
            start.

    Attributes:
        multiplier, target, violation: [C] tensors, one entry a constraint, in `names`' order.
        restarts: [C] number of dual restarts so far.
        dual_lr: 0-d tensor; may be changed during training.

    Raises:
        ValueError, TypeError: an unknown layer, or a target that cannot be met (the message has
            the range that can). Costs do not fall when a gate opens, so one set of gates, the
            fewest, has the least of every cost: targets that can each be met can all be met.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021.
    """

    multiplier: Tensor
    target: Tensor
    _left_on_model: dict[Group, float]
    violation: Tensor
    restarts: Tensor
    dual_lr: Tensor
    start: Tensor
    taken: Tensor

    def __init__(
        self,
        model: nn.Module,
        target: Asked | Mapping[str, Asked],
        *,
        measure: AnyMeasure = "gates",
        example_inputs: Any = None,
        dual: Dual | None = None,
        schedule: TargetSchedule | None = None,
    ) -> None:
        for name, value, kind in (("dual", dual, Dual), ("schedule", schedule, TargetSchedule)):
            if not (value is None or isinstance(value, kind)):
                _checks.refuse(name, value, f"a {kind.__name__} or None", TypeError)
        model = unwrapped(model)
        measure = settled(measure, model, example_inputs)
        named = target_groups(model, target, measure)
        super().__init__(model, [group for group, _ in named.values()], example_inputs)
        self.dual: Dual = dual or DualAscent()
        self.schedule = schedule
        self.measure = measure_name(measure)
        self.groups = {name: group for name, (group, _) in named.items()}
        totals: list[float] = self.__dict__["_measure"].totals
        targets: list[float] = []
        for name, (_, asked), total, lowest in zip(
            named, named.values(), totals, self._lowest, strict=True
        ):
            title = f"target[{name!r}]" if isinstance(target, Mapping) else "target"
            targets.append(share(title, asked, self.measure, total, lowest))
        place: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        self.register_buffer("multiplier", torch.zeros(len(targets), **place))
        self.register_buffer("target", torch.tensor(targets, **place))
        self.register_buffer("violation", torch.zeros(len(targets), **place))
        for name in dict.fromkeys(("restarts", *self.dual.memory)):
            self.register_buffer(name, torch.zeros(len(targets), **place))
        self.register_buffer("dual_lr", torch.tensor(self.dual.lr, **place))
        if schedule is not None:
            self.register_buffer("start", torch.zeros(len(targets), **place))
            self.register_buffer("taken", torch.zeros((), **place))
            self.begin_()
        self._moved = False
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

    @property
    def targets(self) -> dict[str, float]:
        """Name of each constraint -> its target, as it was named."""
        return dict(zip(self.names, self._exact, strict=True))

    def realised(self) -> dict[str, float]:
        """Name of each constraint -> its density with the gates as they are in evaluation."""
        return dict(zip(self.names, self._shares(), strict=True))

    def budgets(self) -> list[Budget]:
        """The targets, for `settle`."""
        measure: Measure = self.__dict__["_measure"]
        return [
            Budget(name, group.layers, target, measure, place)
            for place, ((name, group), target) in enumerate(
                zip(self.groups.items(), self._exact, strict=True)
            )
        ]

    @torch.no_grad()
    def rest_(self) -> None:
        """Sets the multipliers to 0, and what else has grown with them."""
        self.multiplier.zero_()
        for name in self.dual.memory:
            if name != "restarts":
                self.get_buffer(name).zero_()
        self._buffers["violation"] = self.densities() - self.target

    def settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().settle(optimizer)
        self.rest_()

    @torch.no_grad()
    def begin_(self) -> None:
        """Lets the targets come down from the densities that the model has now, if they come down;
        as a constraint does when it is built. For a model whose state is loaded after that."""
        if self.schedule is not None:
            named = self.schedule.start
            self.start.copy_(self.densities() if named is None else torch.tensor(named))

    @property
    def aim(self) -> Tensor:
        """[C] the targets in force: the schedule's, or `target`."""
        if self.schedule is None or self.settled:
            return self.target
        return self.schedule.at(self.taken, self.start, self.target)

    @property
    def _memory(self) -> list[Tensor]:
        return [self._buffers[name] for name in self.dual.memory]  # type: ignore[misc]

    @torch.no_grad()
    def _move(self) -> None:
        self.dual.step_(self.multiplier, self.violation, self.dual_lr, *self._memory)

    def forward(self) -> Tensor:
        """0-d: the dual's term of (density - target), summed over the constraints; 0 once the
        gates are settled."""
        if self.settled:
            return torch.zeros_like(self.dual_lr)
        violation = self.densities() - self.aim
        self._buffers["violation"] = violation.detach()  # past setattr: this is each step's cost
        # Once a step, however many calls accumulate their gradients in it.
        if self.dual.dual_first and not self._moved and torch.is_grad_enabled():
            self._move()
            self._moved = True
        return self.dual.term(self.multiplier, violation, *self._memory)

    def ascend_(self) -> None:
        """Ends a step of the multipliers: moves them, unless they have moved before the loss, or
        the gates are settled."""
        if self.settled:
            return
        if not self.dual.dual_first:
            self._move()
        self._moved = False
        if self.schedule is not None:
            self.taken += 1

    def step(self) -> None:
        """Moves the multipliers and puts every log_alpha back into its bounds."""
        self.ascend_()
        self.project_()

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Refuses the state of constraints on something else."""
        saved = state_dict.get(prefix + "_extra_state", {})
        both = [_in_words(state) for state in (saved, self.get_extra_state()) if state]
        if len(set(both)) > 1:
            _checks.refuse("state_dict", both[0], both[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_extra_state(self) -> dict[str, Any]:
        """What the state holds beside tensors: the layers of each constraint, and the targets."""
        groups = [[name, list(group.layers)] for name, group in self.groups.items()]
        state = {
            "measure": self.measure,
            "groups": groups,
            "targets": list(self._exact),
            "dual": type(self.dual).__name__,
            "scheduled": self.schedule is not None,
            **super().get_extra_state(),
        }
        table = self.table
        return state if table is None else {**state, "latency": table.as_json()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the targets over, for `prune` too, and the table they are shares of."""
        if "latency" in state:
            table = LatencyTable.from_json(state["latency"])
            for group in self.groups.values():
                self._left_on_model.pop(group, None)
            self.groups = {n: g._replace(measure=table) for n, g in self.groups.items()}
            measure: Latency = self.__dict__["_measure"]
            measure.take(list(self.groups.values()))
        self._set_targets(list(state["targets"]))
        super().set_extra_state(state)

    @property
    def table(self) -> LatencyTable | None:
        """What latencies are read off, if the measure is one."""
        measure = next(iter(self.groups.values())).measure
        return measure if isinstance(measure, LatencyTable) else None

    def extra_repr(self) -> str:
        pairs = zip(self.names, self._exact, strict=True)
        by = "" if self.measure == "gates" else f" by {self.measure}"
        return ", ".join(f"{name} <= {target:g}" for name, target in pairs) + by


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
        model = unwrapped(model)
        layers = require_gated(model)
        super().__init__(model, [Group(tuple(layers))])
        if num_examples is not None:
            _checks.whole("num_examples", num_examples)
            coefficient *= gated_parameters(list(layers.values())) / num_examples
        place: dict[str, Any] = {"dtype": self._dtype, "device": self._device}
        self.register_buffer("coefficient", torch.tensor(coefficient, **place))
        self.names = (WHOLE_MODEL,)

    def forward(self) -> Tensor:
        """0-d: coefficient * density; 0 once the gates are settled."""
        if self.settled:
            return torch.zeros_like(self.coefficient)
        return self.coefficient * self.densities().squeeze(0)

    def step(self) -> None:
        """Puts every log_alpha back into its bounds; there is no multiplier to move."""
        self.project_()
