"""What the pruned model will have: parameters or MACs, as a function of the open probabilities."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast.compact import layer_size
from l0fast.density import Group, count_macs, count_params
from l0fast.draw import gated_layers
from l0fast.graph import Walk
from l0fast.layers import Gated
from l0fast.measure import GateMeasure, Measure, OwnMeasure
from l0fast.plan import Plan, fold, make_plan, reference


@dataclass(frozen=True)
class Dense:
    """A plain model of full size, counted."""

    params: dict[str, int]
    """By module name ("" is all): each tensor once in a module."""
    macs: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...]) -> Dense:
        params = {name: count_params(module) for name, module in model.named_modules()}
        return cls(params, count_macs(model, args))


def trial(model: nn.Module, args: tuple[Any, ...]) -> tuple[Plan, Dense]:
    """How `prune` will carry out closed gates, tried with every other unit closed."""
    twin = copy.deepcopy(model)
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, layer in gated_layers(twin).items():
            layer.log_alpha.fill_(layer.distribution.bound)
            kept[name] = torch.ones(layer.log_alpha.shape, dtype=torch.bool)
            if layer.gates != "weight":
                kept[name][1::2] = False
    twin, wide, proof = reference(twin, args, kept)
    plan = make_plan(twin, gated_layers(twin), kept, wide, proof)
    return plan, Dense.of(fold(twin, plan.raw).model, wide)


class Footprint(Measure):
    """Parameters or MACs of the pruned model, and of groups of its layers.

    Equals, summed over the layers:
        weight = prod(kernel sizes) for parameters, times the positions computed for MACs
        weight * inputs * outputs + (outputs for the biases, where parameters are counted)
        inputs = max(1, sum(p(own gate) * p(gate of the unit's maker)))
        outputs = max(1, sum(p(own gate) * (1 - prod(1 - p(gate of each reader)))))
    with p = 1 where there is no gate, and the rest of the model added as it is. With gates that
    are all open or closed these are the pruned model's own counts.

    Args:
        layers: the model's gated layers.
        plan: how closed gates are carried out (see `trial`); which unit has which gates.
        dense: the counts of the model with every gate open.
        groups: of one measure, "params" or "macs".
    """

    shift: Tensor
    first: Tensor
    makers: Tensor
    readers: Tensor
    reader_lengths: Tensor
    never_unread: Tensor
    lengths: Tensor
    weight: Tensor
    bias: Tensor
    member: Tensor
    rest: Tensor
    total: Tensor

    def __init__(
        self, layers: Mapping[str, Gated], plan: Plan, dense: Dense, groups: list[Group]
    ) -> None:
        super().__init__(layers)
        self.gated = [name for name, layer in layers.items() if layer.gates != "weight"]
        # A layer that cannot get smaller is part of the rest, which is added as it is.
        names = [name for name, site in plan.sites.items() if site.local]
        tensors = self._units(plan, names) | self._sizes(plan, names, dense, groups)
        self.totals = tensors["total"].tolist()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def _units(self, plan: Plan, names: list[str]) -> dict[str, Tensor]:
        """Which gates each unit of the layers hangs on."""
        counts = torch.tensor([self.layers[name].num_gates for name in self.gated]).long()
        starts = dict(zip(self.gated, (counts.cumsum(0) - counts).tolist(), strict=True))
        always = int(counts.sum())  # one gate more, which is always open

        def gates(name: str, side: str, units: int) -> Tensor:
            """[units] the gate that each unit on one side of a layer has."""
            if name in plan.scaled or name not in starts or self.layers[name].gates != side:
                return torch.full((units,), always)
            return torch.arange(starts[name], starts[name] + units)

        sizes = {name: layer_size(site.layer) for name, site in plan.sites.items()}
        own = {name: gates(name, "output", outputs) for name, (_, outputs) in sizes.items()}
        own_by_label = torch.cat(list(own.values()))
        counted = torch.cat([torch.full(own[n].shape, s.local) for n, s in plan.sites.items()])
        walk: Walk | None = None
        if plan.trace is not None:
            # With every gated output closed it shows where closing one leaves zeros.
            shut = {n: replace(site, writes=own[n] == always) for n, site in plan.sites.items()}
            walk = Walk(plan.trace, shut, plan.views)
            walk.run()

        needed = torch.ones_like(counted)
        columns: list[Tensor] = []
        makers: list[Tensor] = []
        labels_read, read_by = [torch.zeros(0).long()], [torch.zeros(0).long()]
        for name in names:
            inputs = sizes[name][0]
            columns.append(gates(name, "input", inputs))
            makers.append(torch.full((inputs,), always))
            if walk is None or plan.sites[name].fixed or walk.trace.counts[name] != 1:
                continue
            needed[walk.ranges[name]] = walk.pinned[walk.ranges[name]]
            flow, _ = walk.reading[name]
            if flow is not None:
                gone = (flow.constant == 0) & ~walk.tainted[flow.labels]
                makers[-1] = torch.where(gone, own_by_label[flow.labels], always)
                labels_read.append(flow.labels)
                read_by.append(columns[-1])
        labels, readers = torch.cat(labels_read), torch.cat(read_by)
        # A unit with a reader that has no gate is there as soon as its own gate is open.
        needed[labels[readers == always]] = True
        undecided = counted[labels] & ~needed[labels]
        labels, readers = labels[undecided], readers[undecided]
        shift = [self.layers[name].distribution.shift for name in self.gated]
        each = torch.cat([counts, torch.ones(1).long()])
        wide = torch.float64
        return {
            "shift": torch.tensor([*shift, torch.inf], dtype=wide).repeat_interleave(each),
            "first": torch.cat([*columns, *(own[name] for name in names)]),
            "makers": torch.cat(makers),
            "readers": readers[labels.argsort(stable=True)],
            "reader_lengths": labels.bincount(minlength=len(counted))[counted],
            "never_unread": torch.where(needed[counted], -torch.inf, 0.0).to(wide),
            "lengths": torch.tensor([sizes[name][side] for side in (0, 1) for name in names]),
        }

    @staticmethod
    def _sizes(
        plan: Plan, names: list[str], dense: Dense, groups: list[Group]
    ) -> dict[str, Tensor]:
        """What a pair of units, and a bias, of each layer costs; what each group has besides."""
        params = groups[0].measure == "params"
        cost = dense.params if params else dense.macs
        weight: list[float] = []
        bias: list[float] = []
        for name in names:
            layer = plan.sites[name].layer
            inputs, outputs = layer_size(layer)
            bias.append(float(params and layer._parameters.get("bias") is not None))
            weight.append((cost[name] - bias[-1] * outputs) / (inputs * outputs))
        member: list[list[bool]] = []
        rest: list[int] = []
        total: list[int] = []
        for group in groups:
            if group.whole is None:
                inside = [name in group.layers for name in names]
                total.append(sum(cost[name] for name in group.layers))
            else:
                prefix = f"{group.whole}." if group.whole else ""
                inside = [name.startswith(prefix) for name in names]
                total.append(cost[group.whole])
            member.append(inside)
            shrinking = (cost[name] for name, of in zip(names, inside, strict=True) if of)
            rest.append(total[-1] - sum(shrinking))
        tensors = {"weight": weight, "bias": bias, "member": member, "rest": rest, "total": total}
        return {name: torch.tensor(v, dtype=torch.float64) for name, v in tensors.items()}

    def _costs(self, logits: Tensor) -> Tensor:
        opened = torch.sigmoid(logits)
        # 1 - p in logarithms, so that neither the product nor its gradient suffers near 0 and 1.
        log_closed = F.logsigmoid(-logits)[self.readers]
        log_unread = self._sums(log_closed, self.reader_lengths) + self.never_unread
        other = torch.cat([opened[self.makers], -torch.expm1(log_unread)])
        sides = self._sums(opened[self.first] * other, self.lengths).clamp(min=1.0)
        inputs, outputs = sides.view(2, -1)
        return (self.member * (outputs * (inputs * self.weight + self.bias))).sum(1) + self.rest

    @staticmethod
    def _sums(values: Tensor, lengths: Tensor) -> Tensor:
        return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)

    def costs(self, logits: Mapping[str, Tensor]) -> Tensor:
        always = self.shift[-1:]
        return self._costs(torch.cat([*(logits[name].flatten() for name in self.gated), always]))

    def forward(self) -> Tensor:
        gates = [self.layers[name].log_alpha for name in self.gated]
        logits = torch.cat([*gates, self.shift.new_zeros(1)]).to(self.shift.dtype) + self.shift
        return self._costs(logits) / self.total


def measure_of(
    layers: Mapping[str, Gated], groups: list[Group], tried: tuple[Plan, Dense] | None
) -> Measure:
    """The measure that all of `groups` name; `tried` as from `trial`, for "params" and "macs"."""
    measure = groups[0].measure
    if callable(measure):
        return OwnMeasure(layers, groups[0])
    if measure == "gates":
        return GateMeasure(layers, groups)
    assert tried is not None
    return Footprint(layers, *tried, groups)
