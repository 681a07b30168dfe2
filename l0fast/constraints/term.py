"""What the constraint and the penalty share: densities, and the projection after a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.autograd import advance_
from l0fast.constraints.attach import Attachable
from l0fast.constraints.processes import check_sharding
from l0fast.constraints.settle import kept_open, settle_
from l0fast.graph.calls import Example
from l0fast.graph.sharding import with_full_weights
from l0fast.layers.experts import expert_gates
from l0fast.layers.gated import Gated
from l0fast.layers.handle import ModelGates, gates, own_gates, refuse_adapters
from l0fast.layers.serving import likeliest
from l0fast.layers.stages import DRAWN, OPEN, QUIET, SETTLED
from l0fast.maths.advance import Ascent, Limits, within
from l0fast.measures.groups import Asking, Group, measure_name
from l0fast.measures.measure import GateMeasure, Measure, is_of_pruned
from l0fast.measures.pick import measure_of
from l0fast.pruning.choose import Budget
from l0fast.pruning.trial import tried


def _groups(terms: Iterable[Asking]) -> set[Group]:
    return {group for term in terms for group, _ in term.asked().values()}


def refuse_others(terms: Sequence[DensityTerm]) -> None:
    """Refuses to decide gates by some of the targets of the constraints that are alive."""
    others = _groups(terms[0].handle.constraints) - _groups(terms)
    if others:
        found = sorted(f"{' '.join(one.layers)} by {measure_name(one.measure)}" for one in others)
        expected = (
            "no other targets on the model. Put all its constraints into Constraints and settle "
            "that, or delete the other constraint"
        )
        _checks.refuse("settle", "; ".join(found), expected)


class DensityTerm(Attachable, nn.Module):
    """Expected densities of groups of a model's gated layers, and the projection after a step."""

    handle: ModelGates
    """Of the model; it holds this term by a weak reference."""
    counts_on_host: bool = False
    """Whether a step does work on the host, which no replay of a CUDA graph would repeat."""

    def __init__(self, model: nn.Module, groups: list[Group], example_inputs: Any = None) -> None:
        super().__init__()
        refuse_adapters(type(self).__name__, model)
        handle = gates(model)
        layers = dict(handle.layers)
        check_sharding(type(self).__name__, layers)
        sized = is_of_pruned(groups[0].measure)
        with with_full_weights(model):
            trial = tried(model, Example.of(example_inputs, model))[0] if sized else None
        measure = measure_of(layers, groups, trial)
        # The layers belong to the model: kept out of this module's children and state.
        self.__dict__.update(handle=handle, _layers=layers, _measure=measure)
        anchor = next(iter(layers.values())).log_alpha
        self._dtype = torch.promote_types(anchor.dtype, torch.float32)
        self._device = anchor.device
        self._lowest = measure.lowest()
        measure.to(self._device, self._dtype)
        self._owning = own_gates(layers)
        distributions = [layers[name].distribution for name in self._owning]
        self._limits: dict[bool, tuple[Limits, ...]] = {  # settled or not
            False: tuple([within(of.bound) for of in distributions]),
            True: tuple([kept_open(of) for of in distributions]),
        }

    def _take_over(self) -> None:
        """Ends the making of a term: from here on gates have noise, whatever was trained before."""
        self.handle.set_stage(DRAWN)
        self.handle.add_constraint(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle.add_constraint(self)  # the model was copied with it

    @property
    def settled(self) -> bool:
        """Whether the gates are decided (see `settle`)."""
        return self.handle.settled

    def settle(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Decides all gates, for the last part of a training; call it once, between two steps.

        As many gates are kept as the targets allow, in the order of their open probability; each
        has its mean under noise from then on, is trained on without noise, and stays open. The
        others are closed for good. The call adds nothing to the loss any more. What is trained
        then is what `prune` gives. The state says so: load it after a fresh start, and the training
        goes on without noise. Where the density is still far above a target there is a warning.

        Args:
            optimizer: the one of the gates; it loses its moments of every log_alpha.

        Raises:
            ValueError, TypeError: the targets do not hold one unit of each layer, the model has
                others beside them, or `optimizer` is none.
        """
        refuse_others([self])
        self.end_start_()
        settle_(self.handle, self.budgets(), optimizer)

    def budgets(self) -> list[Budget]:
        """The targets."""
        return []

    def get_extra_state(self) -> dict[str, Any]:
        """What the state holds beside tensors: whether the gates are decided, how many steps are
        left in which all of them are open, and whether they are quiet."""
        return {
            "settled": self.settled,
            "open_left": self.open_left if self.starting else 0,
            "quiet": self.handle.stage == QUIET,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes it over, for the model's layers."""
        self.open_left = state.get("open_left", 0)
        if state.get("settled", False):
            self.handle.set_stage(SETTLED)
        else:
            drawn = QUIET if state.get("quiet", False) else DRAWN
            self.handle.set_stage(OPEN if self.open_left else drawn)

    @property
    def layers(self) -> dict[str, Gated]:
        """Name -> gated layer of the model."""
        return self.__dict__["_layers"]

    def densities(self) -> Tensor:
        """[C] expected densities, differentiable; of what is kept, once it is settled."""
        measure = self._placed_measure()
        if self.settled:
            return torch.tensor(self._shares(), dtype=self._dtype, device=self._device)
        return measure()

    def _open_counts(self) -> tuple[Tensor, Tensor] | None:
        """What the densities are a product of, if the measure is expected L0."""
        measure = self._placed_measure()
        return measure.counted() if isinstance(measure, GateMeasure) else None

    def _placed_measure(self) -> Measure:
        """The measure, on the model's device like all else here."""
        measure: Measure = self.__dict__["_measure"]
        device = next(iter(self.layers.values())).log_alpha.device
        if self._device != device:  # the model has moved
            self._device = device
            self.to(device)
            measure.to(device)
        return measure

    @torch.no_grad()
    def _shares(self) -> list[float]:
        """[C] densities with the gates as they are in evaluation; of experts, as many count as
        each token needs, which `prune` keeps in any case."""
        measure: Measure = self.__dict__["_measure"]
        opened = {name: layer.evaluation_gates() > 0 for name, layer in self.layers.items()}
        for name, gate in expert_gates(self.layers).items():
            opened[name] |= likeliest([gate], gate.log_alpha)
        spent = zip(measure.spent(opened), measure.totals, strict=True)
        return [cost / total for cost, total in spent]

    def check_state(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Refuses the state of a term on something else."""

    def advance_(self) -> None:
        """Ends a step: puts every log_alpha back into its bounds."""
        self.project_()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # A model in half precision may hold its constraint: multipliers stay in float32.
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = buffer.to(moved.device)
        return self

    @torch.no_grad()
    def project_(self, ascent: Ascent | None = None) -> None:
        """Puts every log_alpha back into its bounds; with `ascent`, the multipliers move, too."""
        gates: list[Tensor] = [self.layers[name].log_alpha for name in self._owning]
        advance_(gates, self._limits[self.settled], ascent)
