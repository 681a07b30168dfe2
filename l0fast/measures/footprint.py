"""What the pruned model will have, as a function of the open probabilities: parameters, MACs,
memory of its activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from l0fast import _checks
from l0fast.graph.capture import layer_size
from l0fast.graph.dependencies import GateDependencies
from l0fast.graph.ways import smallest
from l0fast.layers.gated import Gated
from l0fast.layers.handle import own_gates
from l0fast.measures.amounts import words
from l0fast.measures.branches import beside_units, gates_of, parts_of
from l0fast.measures.counts import Counts
from l0fast.measures.groups import Group, measure_name
from l0fast.measures.measure import Measure
from l0fast.measures.products import products, unreckoned
from l0fast.measures.trial import Trial


class Footprint(Measure):
    """Parameters, MACs, memory or latency of the pruned model, and of groups of its layers.

    Equals, summed over the layers:
        weight = prod(kernel sizes) for parameters, times the positions computed for MACs
        weight * inputs * outputs + (outputs for the biases, where parameters are counted)
        inputs = max(1, sum(p(own gate) * p(gates of what makes the input)))
        outputs = max(1, sum(p(own gate) * (1 - prod(1 - p(way to each reader)))))
    with p = 1 where there is no gate, and the rest of the model added as it is. A batch norm, and
    a convolution in groups, have as many outputs as are read behind them. Ways to several readers
    count as independent. Products of matrices, such as attention's, cost in proportion to the
    units of their result, counted like outputs. A branch, or an expert, counts by p(its gate);
    where a router picks experts, each token makes as much work as before. Memory is outputs *
    positions of each layer; latency is read off a table, at (inputs, outputs). With gates that are
    all open or closed these are the pruned model's own counts.

    Args:
        layers: the model's gated layers.
        tried: how closed gates are carried out; which unit depends on which gates.
        groups: of one measure: "params", "macs", "memory" or a latency table.

    Raises:
        ValueError: what the trial left is not what this reckons.
    """

    slack = 0.5
    """How far what is reckoned may be from what a trial left."""
    shift: Tensor
    inputs_all: Tensor
    inputs_any: Tensor
    first: Tensor
    outputs_all: Tensor
    outputs_any: Tensor
    around: Tensor
    beside: Tensor
    beside_all: Tensor
    beside_any: Tensor
    lengths: Tensor
    least: Tensor
    weight: Tensor
    bias: Tensor
    product: Tensor
    member: Tensor
    rest: Tensor
    total: Tensor

    def __init__(self, layers: Mapping[str, Gated], tried: Trial, groups: list[Group]) -> None:
        super().__init__(layers)
        on_units = {name: layer for name, layer in layers.items() if layer.gates != "weight"}
        self.gated = own_gates(on_units)
        self.groups, self.measure = groups, measure_name(groups[0].measure)
        # A layer that cannot get smaller is part of the rest, which is added as it is.
        self.names = list(tried.shrinking)
        told = (
            tried.dense.params if self.measure == "params" else tried.shares.get(self.measure, {})
        )
        self.names += [name for name in tried.held if name in told]
        live = tried.live
        counted = self.measure in ("macs", "memory")
        self.products = products(live.walk) if counted and live is not None else []
        needs = tried.dependencies if self.measure == "params" else tried.by_token
        for name, tensor in (self._units(needs) | self._sizes(tried)).items():
            self.register_buffer(name, tensor, persistent=False)
        self.totals = self.left(tried.dense)
        sums = [
            one
            for kept, counts in tried.found()
            for one in zip(self.spent(kept), self.left(counts), self.totals, strict=True)
        ]
        for reckoned, real, total in sums:
            if abs(reckoned - real) > self.slack:
                ops = [] if live is None else unreckoned(live.walk.trace)
                why = f"; {', '.join(ops)} is not reckoned" if ops else ""
                left, of, told = (words(value, self.measure) for value in (real, total, reckoned))
                expected = (
                    "another: what closed gates leave of this model cannot be told from its "
                    f"structure (a trial left {left} of {of}, not {told}{why})"
                )
                _checks.refuse("measure", self.measure, expected)

    def _units(self, needs: GateDependencies) -> dict[str, Tensor]:
        """Which gates the units of the layers, and of the products, depend on."""
        inputs = needs.inputs(self.names)
        others = [(product.caller, product.units) for product in self.products]
        first, outputs = needs.outputs(self.names, others)
        self.parts = parts_of(needs)
        beside = gates_of(self.parts, needs.always, needs.never)
        shifts = [torch.full((0,), 0.0, dtype=torch.float64)]
        for name in self.gated:
            layer = self.layers[name]
            shifts.append(shifts[0].new_full((layer.log_alpha.numel(),), layer.distribution.shift))
        certain = shifts[0].new_tensor([torch.inf, -torch.inf])  # always open, and never
        sides = [len(side[name]) for side in (needs.reads, needs.writes) for name in self.names]
        least = [count(name) for count in (needs.least_read, needs.least) for name in self.names]
        return {
            "shift": torch.cat([*shifts, certain]),
            "inputs_all": inputs.all_of,
            "inputs_any": inputs.any_of,
            "around": torch.stack(
                [needs.gates_around(name) for name in (*self.names, *(name for name, _ in others))]
            ),
            "beside_all": beside[0],
            "beside_any": beside[1],
            "first": first,
            "outputs_all": outputs.all_of,
            "outputs_any": outputs.any_of,
            "lengths": torch.tensor([*sides, *(len(units) for _, units in others)]),
            "least": torch.tensor(
                [*least, *(smallest(units) for _, units in others)], dtype=torch.float64
            ),
        }

    def _inside(self, names: list[str]) -> Tensor:
        """[C, L] bool: whether each group counts each of some modules."""
        inside: list[list[bool]] = []
        for group in self.groups:
            prefix = f"{group.whole}." if group.whole else ""
            of = names if group.whole is not None else group.layers
            inside.append([name in of and f"{name}.".startswith(prefix) for name in names])
        return torch.tensor(inside, dtype=torch.bool).view(len(inside), -1)

    def _each(self, tried: Trial) -> dict[str, float]:
        """Layer -> what it has; the weight of an embedding and its head counts once."""
        cost: dict[str, float] = dict(getattr(tried.dense, self.measure))
        counted: set[int] = set()
        for name in self.names if self.measure == "params" else []:
            weight: Any = tried.sites[name].layer._parameters.get("weight")
            if tried.sites[name].bound and id(weight) in counted:
                cost[name] -= weight.numel()
            counted.add(id(weight))
        return {**cost, **tried.shares.get(self.measure, {})}

    def _sizes(self, tried: Trial) -> dict[str, Tensor]:
        """What a pair of units, and one more output, of each layer costs; what a unit of each
        product does; what each group has besides."""
        cost = self._each(tried)
        weight: list[float] = []
        bias: list[float] = []
        for name in self.names:
            layer = tried.sites[name].layer
            inputs, outputs = layer_size(layer)
            alone = 0.0
            if self.measure == "memory":
                alone = cost[name] / outputs
            elif self.measure == "params":
                alone = float(layer._parameters.get("bias") is not None)
            bias.append(alone)
            weight.append((cost[name] - alone * outputs) / (inputs * outputs))
        each = [one.macs if self.measure == "macs" else one.elements for one in self.products]
        scale = tried.element_size if self.measure == "memory" else 1
        product = torch.tensor(each, dtype=torch.float64) * scale
        units = torch.tensor([float(len(one.units)) for one in self.products], dtype=torch.float64)
        member = self._inside(self.names).double()
        among = self._inside([one.caller for one in self.products]).double()
        total = torch.tensor([tried.dense.group(group) for group in self.groups]).double()
        dense = torch.tensor([cost[name] for name in self.names]).double()
        callers = [one.caller for one in self.products]
        reckoned = [*(member * dense).unbind(1), *(among * product * units).unbind(1)]
        pairs = list(zip((*self.names, *callers), reckoned, strict=True))
        beside = beside_units(self.parts, cost, self.groups, pairs)
        rest = total - (member * dense).sum(1) - (among * product * units).sum(1)
        return {
            "beside": beside,
            "weight": torch.tensor(weight, dtype=torch.float64),
            "bias": torch.tensor(bias, dtype=torch.float64),
            "member": member,
            "product": among * product,
            "rest": rest - beside.sum(1),
            "total": total,
        }

    def left(self, counts: Counts) -> list[float]:
        """[C] what the groups of a plain model have."""
        return [float(counts.group(group)) for group in self.groups]

    def _layer_costs(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """[L] what each layer costs with so many inputs and outputs."""
        return outputs * (inputs * self.weight + self.bias)

    def _costs(self, logits: Tensor) -> Tensor:
        opened = torch.sigmoid(logits)

        def way(all_of: Tensor, any_of: Tensor) -> Tensor:
            return _product(opened[all_of]) * (1 - _product(1 - opened[any_of]))

        inputs = way(self.inputs_all, self.inputs_any)
        unread = _product(1 - way(self.outputs_all, self.outputs_any))
        units = torch.cat([inputs, opened[self.first] * (1 - unread)])
        sums = torch.segment_reduce(units, "sum", lengths=self.lengths, unsafe=True)
        counts = torch.maximum(sums, self.least)
        layers = len(self.names)
        each = self._layer_costs(counts[:layers], counts[layers : 2 * layers])
        given = counts[2 * layers :]
        if self.parts:
            there = _product(opened[self.around])
            each, given = each * there[:layers], given * there[layers:]
        costs = (self.member * each).sum(1)
        if self.products:
            costs = costs + (self.product * given).sum(1)
        if self.parts:
            costs = costs + (self.beside * way(self.beside_all, self.beside_any)).sum(1)
        return costs + self.rest

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
