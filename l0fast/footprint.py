"""What the pruned model will have: parameters or MACs, as a function of the open probabilities."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.compact import apply
from l0fast.density import Group, count_macs, count_params
from l0fast.draw import gate_owners, gated_layers, own_gates
from l0fast.graph import layer_size
from l0fast.hinges import Hinges
from l0fast.layers import Gated
from l0fast.measure import GateMeasure, Measure, OwnMeasure
from l0fast.plan import Plan, fold, make_plan, reference


@dataclass(frozen=True)
class Counts:
    """A plain model, counted."""

    params: dict[str, int]
    """By module name ("" is all): each tensor once in a module."""
    macs: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...]) -> Counts:
        params = {name: count_params(module) for name, module in model.named_modules()}
        return cls(params, count_macs(model, args))

    def by(self, measure: str) -> dict[str, int]:
        """Those of one measure, "params" or "macs"."""
        return self.params if measure == "params" else self.macs

    def group(self, group: Group) -> int:
        """What a group has, by its measure."""
        counts = self.by(str(group.measure))
        if group.whole is not None:
            return counts[group.whole]
        return sum(counts[name] for name in group.layers)


@dataclass(frozen=True)
class Trial:
    """How `prune` carried out some closed gates, and what was left."""

    plan: Plan
    kept: dict[str, Tensor]
    """Layer -> bool, of log_alpha's shape: the gates that were open."""
    dense: Counts
    """With every gate open."""
    left: Counts


def trial(model: nn.Module, args: tuple[Any, ...]) -> Trial:
    """Prunes with about half of the units closed."""
    twin = copy.deepcopy(model)
    kept: dict[str, Tensor] = {}
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, layer in gated_layers(twin).items():
            layer.log_alpha.fill_(layer.distribution.bound)
            kept[name] = torch.ones(layer.log_alpha.shape, dtype=torch.bool)
            if layer.gates != "weight":
                closed = torch.randperm(layer.num_gates, generator=chance)[layer.num_gates // 2 :]
                kept[name][closed[: layer.num_gates - 1]] = False
    owners = gate_owners(gated_layers(twin))
    kept = {name: kept[owner] for name, owner in owners.items()}
    twin, wide, proof = reference(twin, args, kept)
    plan = make_plan(twin, gated_layers(twin), kept, wide, proof)
    folded = fold(twin, plan.raw)
    dense = Counts.of(folded.model, wide)
    small = apply(folded.model, plan.edits, folded.factors, plan.mends)
    return Trial(plan, kept, dense, Counts.of(small, wide))


class Footprint(Measure):
    """Parameters or MACs of the pruned model, and of groups of its layers.

    Equals, summed over the layers:
        weight = prod(kernel sizes) for parameters, times the positions computed for MACs
        weight * inputs * outputs + (outputs for the biases, where parameters are counted)
        inputs = max(1, sum(p(own gate) * p(gates of what makes the input)))
        outputs = max(1, sum(p(own gate) * (1 - prod(1 - p(way to each reader)))))
    with p = 1 where there is no gate, and the rest of the model added as it is. A batch norm, and
    a convolution in groups, have as many outputs as are read behind them. Ways to several readers
    count as independent. With gates that are all open or closed these are the pruned model's own
    counts.

    Args:
        layers: the model's gated layers.
        tried: how closed gates are carried out; which unit has which gates.
        groups: of one measure, "params" or "macs".

    Raises:
        ValueError: what the trial left is not what this reckons.
    """

    shift: Tensor
    inputs_all: Tensor
    inputs_any: Tensor
    first: Tensor
    outputs_all: Tensor
    outputs_any: Tensor
    lengths: Tensor
    least: Tensor
    weight: Tensor
    bias: Tensor
    member: Tensor
    rest: Tensor
    total: Tensor

    def __init__(self, layers: Mapping[str, Gated], tried: Trial, groups: list[Group]) -> None:
        super().__init__(layers)
        on_units = {name: layer for name, layer in layers.items() if layer.gates != "weight"}
        self.gated = own_gates(on_units)
        hinges = Hinges(on_units, tried.plan)
        # A layer that cannot get smaller is part of the rest, which is added as it is.
        names = [
            name
            for name, site in tried.plan.sites.items()
            if site.local or (tried.plan.live is not None and not site.fixed)
        ]
        tensors = self._units(hinges, names) | self._sizes(names, tried, groups)
        self.totals = tensors["total"].tolist()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        for group, reckoned in zip(groups, self.spent(tried.kept), strict=True):
            left = tried.left.group(group)
            if abs(reckoned - left) > 0.5:
                expected = (
                    "another: what closed gates leave of this model cannot be told from its "
                    f"structure (a trial left {left:,} of {tried.dense.group(group):,}, "
                    f"not {reckoned:,.0f})"
                )
                _checks.refuse("measure", group.measure, expected)

    def _units(self, hinges: Hinges, names: list[str]) -> dict[str, Tensor]:
        """Which gates the units of some layers hang on."""
        inputs = hinges.inputs(names)
        first, outputs = hinges.outputs(names)
        shifts = [torch.full((0,), 0.0, dtype=torch.float64)]
        for name in self.gated:
            layer = self.layers[name]
            shifts.append(shifts[0].new_full((layer.num_gates,), layer.distribution.shift))
        certain = shifts[0].new_tensor([torch.inf, -torch.inf])  # always open, and never
        sides = [[len(side[name]) for name in names] for side in (hinges.reads, hinges.writes)]
        return {
            "shift": torch.cat([*shifts, certain]),
            "inputs_all": inputs.all_of,
            "inputs_any": inputs.any_of,
            "first": first,
            "outputs_all": outputs.all_of,
            "outputs_any": outputs.any_of,
            "lengths": torch.tensor(sides).flatten(),
            "least": torch.tensor([1.0] * len(names) + [float(hinges.least(n)) for n in names]),
        }

    @staticmethod
    def _sizes(names: list[str], tried: Trial, groups: list[Group]) -> dict[str, Tensor]:
        """What a pair of units, and a bias, of each layer costs; what each group has besides."""
        measure = str(groups[0].measure)
        cost = tried.dense.by(measure)
        weight: list[float] = []
        bias: list[float] = []
        for name in names:
            layer = tried.plan.sites[name].layer
            inputs, outputs = layer_size(layer)
            has_bias = layer._parameters.get("bias") is not None
            bias.append(float(measure == "params" and has_bias))
            weight.append((cost[name] - bias[-1] * outputs) / (inputs * outputs))
        member: list[list[bool]] = []
        rest: list[int] = []
        for group in groups:
            if group.whole is None:
                inside = [name in group.layers for name in names]
            else:
                prefix = f"{group.whole}." if group.whole else ""
                inside = [name.startswith(prefix) for name in names]
            member.append(inside)
            shrinking = (cost[name] for name, of in zip(names, inside, strict=True) if of)
            rest.append(tried.dense.group(group) - sum(shrinking))
        total = [tried.dense.group(group) for group in groups]
        tensors = {"weight": weight, "bias": bias, "member": member, "rest": rest, "total": total}
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in tensors.items()}

    def _costs(self, logits: Tensor) -> Tensor:
        opened = torch.sigmoid(logits)

        def way(all_of: Tensor, any_of: Tensor) -> Tensor:
            return _product(opened[all_of]) * (1 - _product(1 - opened[any_of]))

        inputs = way(self.inputs_all, self.inputs_any)
        unread = _product(1 - way(self.outputs_all, self.outputs_any))
        units = torch.cat([inputs, opened[self.first] * (1 - unread)])
        sums = torch.segment_reduce(units, "sum", lengths=self.lengths, unsafe=True)
        counts_in, counts_out = torch.maximum(sums, self.least).view(2, -1)
        costs = counts_out * (counts_in * self.weight + self.bias)
        return (self.member * costs).sum(1) + self.rest

    def costs(self, logits: Mapping[str, Tensor]) -> Tensor:
        certain = self.shift[-2:]
        return self._costs(torch.cat([*(logits[name].flatten() for name in self.gated), certain]))

    def forward(self) -> Tensor:
        gates = [self.layers[name].log_alpha for name in self.gated]
        logits = torch.cat([*gates, self.shift.new_zeros(2)]).to(self.shift.dtype) + self.shift
        return self._costs(logits) / self.total


def _product(values: Tensor) -> Tensor:
    """Of numbers in [0, 1] along the last dimension. Where one is 0 so is every gradient: that of
    an open probability which is exactly 0 or 1."""
    if values.shape[-1] == 1:
        return values.squeeze(-1)
    zero = values == 0
    return values.masked_fill(zero, 1.0).log().sum(-1).exp().masked_fill(zero.any(-1), 0.0)


def measure_of(layers: Mapping[str, Gated], groups: list[Group], tried: Trial | None) -> Measure:
    """The measure that all of `groups` name; `tried` for "params" and "macs"."""
    measure = groups[0].measure
    if callable(measure):
        return OwnMeasure(layers, groups[0])
    if measure == "gates":
        return GateMeasure(layers, groups)
    assert tried is not None
    return Footprint(layers, tried, groups)
