"""The constraint: a module whose call is the term to add to the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.autograd import Pull, lagrangian
from l0fast.constraints.defaults import dual_for, rules
from l0fast.constraints.dual import Dual
from l0fast.constraints.processes import same_table
from l0fast.constraints.saved import SavedTargets
from l0fast.constraints.schedule import TargetSchedule
from l0fast.constraints.settle import lag_in_words, settle_, warn_of
from l0fast.constraints.start import START, start_steps
from l0fast.constraints.term import refuse_others
from l0fast.graph.calls import unwrapped
from l0fast.layers.handle import gates
from l0fast.maths.lagrangian import Falling
from l0fast.measures.amounts import Asked, share
from l0fast.measures.groups import AnyMeasure, Group, measure_name, target_groups
from l0fast.measures.measure import Measure
from l0fast.pruning.choose import Budget
from l0fast.pruning.timing import with_table


class DensityConstraint(SavedTargets):
    """Keeps a model's density at most at a target, by a Lagrange multiplier.

    Either call `attach(optimizer)` and leave the training loop as it is. Or add `constraint()` to
    the loss, and call `constraint.step()` after `optimizer.step()`.

    Equals, by default (see `dual`):
        (multiplier * (densities - target)).sum()
    `step()` moves the multipliers by the violation of the last call (see `DualAscent`). It uses
    no autograd and does not wait for the device. `prune` holds the pruned model to the same
    targets.

    Args:
        model: a model with gates.
        target: the density asked for, in (0, 1]. One number for the whole model, or a dict of
            layer name or glob pattern -> number; each key is a constraint of its own. Each number
            may be an amount instead, as text with the unit of the measure: "100k gates",
            "100k params", "5M MACs", "1 MB" (10^6 bytes), "2 ms", "3.5 cost" (of your own).
        measure: what the target is a share or an amount of:
            "gates": the gated parameters, as expected L0 counts them (the paper's density).
            "params", "macs": parameters or multiply-accumulates of the pruned model, over those
            of the dense one; of the whole model, or of the layers that a key names. A unit that
            is removed takes its weights in neighbouring layers with it. MACs are those of one
            forward of the example, with its whole batch. Those of the whole model include
            products of matrices, such as attention's.
            "memory": bytes of activations: the outputs of Linears, convolutions, batch norms and
            products of matrices in one forward of the example.
            "latency": seconds of one forward of the example. They are predicted by a table of
            each layer at several widths, which is measured now, on the model's device (see
            `measure_latency`). A `LatencyTable` that was measured before or elsewhere may be
            given in its place. `prune` holds the table's prediction. The constraint's state has
            the table.
            A function: a cost of your own, over the cost with every gate open. It takes a dict of
            layer name -> open probabilities (of log_alpha's shape) and returns a differentiable
            0-d tensor, which must not fall when a probability rises. It takes one number as
            target, for the whole model.
        example_inputs: what the model's forward takes: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments. Every measure of the pruned model needs it, to see
            which layer feeds which.
        steps: optimizer steps of the whole training, >= 1. With it, the options below that are
            not given have these defaults: all gates are open for the first 15 % of the steps, the
            targets come down in a cubic over the next 45 %, and the multipliers move by ascent
            with restarts, at a dual learning rate of 1 / the lowest target.
        start: the share of the steps at the beginning in which all gates are open, without noise,
            in [0, 1). After it the gates are set by the magnitudes of their units, and have a tenth
            of the noise. With 0 they are drawn from the first step, with all of the noise. Without
            `steps`, only `attach` uses it.
        dual: how the multipliers move: `DualAscent` (the default; its lr is 0.001 without
            `steps`), `PIControl`, `AugmentedLagrangian` or `EqualityAscent`. Or a function that
            takes the lowest target, as a share, and returns one of these.
        schedule: how the targets come down to what is asked. None, without `steps`: the targets
            are in force from the start.

    Attributes:
        multiplier, target, violation: tensors [C], one entry for each constraint, in the order of
            `names`.
        restarts: tensor [C], dual restarts so far.
        dual_lr: 0-d tensor; it may be changed during training.

    Raises:
        ValueError, TypeError: an unknown layer, or a target that cannot be met (the message has
            the range of targets that can). Targets that can each be met can all be met together,
            since no cost falls when a gate opens.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(2, 8)
    >>> model = l0fast.sparsify_(model, example_inputs=x)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> constraint = l0fast.DensityConstraint(
    ...     model, target=0.5, measure="params", example_inputs=x, steps=1000
    ... ).attach(optimizer)
    >>> constraint.targets
    {'model': 0.5}
    >>> l0fast.DensityConstraint(model, target="100 params", measure="params", example_inputs=x)
    DensityConstraint(model <= 0.471698 by params)
    """

    multiplier: Tensor
    target: Tensor
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
        steps: int | None = None,
        start: float = START,
        dual: Dual | Callable[[float], Dual] | None = None,
        schedule: TargetSchedule | None = None,
    ) -> None:
        start_steps(start, 1 if steps is None else steps)  # refuses before anything is changed
        schedule, dual = rules(steps, schedule, dual)
        model = unwrapped(model)
        measure = same_table(with_table(measure, model, example_inputs))
        named = target_groups(gates(model).layers, target, measure)
        super().__init__(model, [group for group, _ in named.values()], example_inputs)
        self.schedule, self.steps = schedule, steps
        self.measure = measure_name(measure)
        self.groups = {name: group for name, (group, _) in named.items()}
        totals: list[float] = self.__dict__["_measure"].totals
        targets: list[float] = []
        for name, (_, asked), total, lowest in zip(
            named, named.values(), totals, self._lowest, strict=True
        ):
            title = f"target[{name!r}]" if isinstance(target, Mapping) else "target"
            targets.append(share(title, asked, self.measure, total, lowest))
        self.dual = dual_for(dual, min(targets))
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
        self._exact = targets  # as they were named: `target` holds them rounded
        self._take_over()
        self.start_share = start
        if steps is not None and start:
            self.open_(start_steps(start, steps))

    def asked(self) -> dict[str, tuple[Group, Asked]]:
        """Name of each constraint -> what it is about, and its target."""
        pairs = zip(self.groups.values(), self._exact, strict=True)
        return dict(zip(self.names, pairs, strict=True))

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
    def reset_multipliers_(self) -> None:
        """Sets the multipliers, and the memory of their rule, to 0."""
        # Past autograd: a loss that is formed already can still go backward.
        self.multiplier.data.zero_()
        for name in self.dual.memory:
            if name != "restarts":
                self.get_buffer(name).data.zero_()
        self._buffers["violation"] = self.densities() - self.target

    def settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        refuse_others([self])
        self.end_start_()
        warn_of(self.lag())
        settle_(self.handle, self.budgets(), optimizer)
        self.reset_multipliers_()

    @torch.no_grad()
    def lag(self) -> str | None:
        """A warning if settling closes much at once, else None."""
        if self.settled:
            return None
        densities = dict(zip(self.names, self.densities().tolist(), strict=True))
        attached = self.attachment is not None
        return lag_in_words(densities, self.targets, self.steps, attached)

    @torch.no_grad()
    def lags(self) -> list[float]:
        """How far each density is above its target in force."""
        return (self.densities() - self.current_target).tolist()

    @torch.no_grad()
    def begin_(self) -> None:
        """Makes the densities that the model has now the start of the schedule, if there is one.

        A constraint does this when it is built. Call it if the model's state is loaded later."""
        if self.schedule is not None:
            named = self.schedule.start
            self.start.copy_(self.densities() if named is None else torch.tensor(named))

    @property
    def current_target(self) -> Tensor:
        """[C] the targets in force: the schedule's, or `target`."""
        falling = None if self.settled else self.falling
        return self.target if falling is None else falling.to(self.target)

    @property
    def falling(self) -> Falling | None:
        """How the targets come down, if they do."""
        return None if self.schedule is None else self.schedule.falling(self.taken, self.start)

    @property
    def _memory(self) -> list[Tensor]:
        return [self._buffers[name] for name in self.dual.memory]  # type: ignore[misc]

    @torch.no_grad()
    def _move(self) -> None:
        self.dual.step_(self.multiplier, self.violation, self.dual_lr, *self._memory)

    def value(self) -> Tensor:
        """0-d: the dual's term of (density - target), summed; 0 while no gate is trained."""
        if self.settled or self.starting:
            return torch.zeros_like(self.dual_lr)
        if self.dual.is_plain and (counted := self._open_counts()):
            now = self.multiplier, self.target, self.falling
            term, self._buffers["violation"] = lagrangian(*counted, *now)
            return term
        violation = self.densities() - self.current_target
        self._buffers["violation"] = violation.detach()  # past setattr: this is each step's cost
        # Once a step, however many calls accumulate their gradients in it.
        if self.dual.dual_first and not self._moved and torch.is_grad_enabled():
            self._move()
            self._moved = True
        return self.dual.term(self.multiplier, violation, *self._memory)

    @torch.no_grad()
    def pull(self) -> Pull | None:
        """The same for one launch, if the dual is plain and the measure expected L0."""
        counted = self._open_counts() if self.dual.is_plain else None
        return counted and Pull(*counted, self.multiplier, self.target, self.falling)

    def ascend_(self) -> None:
        """Ends a step: moves the multipliers, unless they have moved or no gate is trained."""
        if self.settled or self.starting:
            return
        if not self.dual.dual_first:
            self._move()
        self._moved = False
        if self.schedule is not None:
            self.taken += 1

    def advance_(self) -> None:
        """Moves the multipliers and puts every log_alpha back into its bounds."""
        idle = self.settled or self.starting
        state = self.multiplier, self.violation, self.dual_lr
        ascent = None if idle else self.dual.ascent(*state, *self._memory)
        if ascent is None:
            self.ascend_()
        elif self.schedule is not None:
            ascent = ascent._replace(taken=self.taken)
        self.project_(ascent)

    def extra_repr(self) -> str:
        pairs = zip(self.names, self._exact, strict=True)
        by = "" if self.measure == "gates" else f" by {self.measure}"
        return ", ".join(f"{name} <= {target:g}" for name, target in pairs) + by
