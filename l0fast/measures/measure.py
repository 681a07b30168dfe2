"""What a target is a share of: the gated parameters, or a cost of the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.layers.expected import expected_open
from l0fast.layers.gated import Gated
from l0fast.layers.handle import sharing
from l0fast.layers.serving import likeliest
from l0fast.maths.lagrangian import shares
from l0fast.measures.groups import AnyMeasure, Group, measure_name
from l0fast.measures.latency import LatencyTable

SIZES = ("params", "macs", "memory")
"""Measures of the pruned model that are counted."""
MEASURES = ("gates", *SIZES, "latency")


def is_of_pruned(measure: AnyMeasure) -> bool:
    """Whether a measure is one of the pruned model."""
    return measure in SIZES or isinstance(measure, LatencyTable)


def check_measure(measure: AnyMeasure, example_inputs: Any) -> None:
    """Refuses what is no measure, and one of the pruned model without an example to export with."""
    if callable(measure):
        return
    if not isinstance(measure, LatencyTable):
        _checks.one_of("measure", measure, MEASURES)
    if measure != "gates" and example_inputs is None:
        expected = f"what the model's forward takes, for measure={measure_name(measure)!r}"
        _checks.refuse("example_inputs", None, expected)


class Measure(nn.Module):
    """Costs of groups of gated layers, as functions of their open probabilities.

    A cost must not fall when a gate opens: what targets can reach, and which gates stay, rest on
    that.
    """

    totals: list[float]
    """What each group costs with every gate open."""

    def __init__(self, layers: Mapping[str, Gated]) -> None:
        super().__init__()
        # The layers belong to the model: kept out of this module's children and state.
        self.__dict__["_layers"] = layers

    @property
    def layers(self) -> Mapping[str, Gated]:
        """Name -> gated layer of the model."""
        return self.__dict__["_layers"]

    def costs(self, logits: Mapping[str, Tensor]) -> Tensor:
        """[C], differentiable; logits: of the open probabilities, by layer, perhaps infinite."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """[C] expected costs over the totals, differentiable; no host sync."""
        raise NotImplementedError

    def spent(self, kept: Mapping[str, Tensor]) -> list[float]:
        """[C] costs with the gates of `kept` (bool, by layer) open and all others closed."""
        buffer = next(self.buffers(), None)
        device = None if buffer is None else buffer.device
        inf = torch.tensor(torch.inf, dtype=torch.float64, device=device)
        with torch.no_grad():
            logits = {name: torch.where(kept[name].to(device), inf, -inf) for name in self.layers}
            return self.costs(logits).tolist()

    def lowest(self) -> list[float]:
        """[C] least shares that the gates can reach, with a unit left in each layer."""
        one_each: dict[str, Tensor] = {}
        floor: dict[str, Tensor] = {}
        for owner, layers in sharing(self.layers).items():
            layer = layers[owner]
            least = layer.distribution.shift - layer.distribution.bound
            logits = torch.full(layer.log_alpha.shape, least, dtype=torch.float64)
            one = torch.zeros_like(logits, dtype=torch.bool)
            if layer.gates != "weight":
                one = likeliest(layers.values(), logits)
            one_each.update(dict.fromkeys(layers, one))
            floor.update(dict.fromkeys(layers, logits))
        with torch.no_grad():
            at_floor: list[float] = self.costs(floor).tolist()
        costs = zip(self.spent(one_each), at_floor, self.totals, strict=True)
        return [max(one, other) / total for one, other, total in costs]


class GateMeasure(Measure):
    """Parameters that the gates control: expected L0, whose share is the paper's density."""

    sizes: Tensor
    """[C, L] parameters that a gate of each layer controls; 0 for layers of other groups."""
    weights: Tensor
    """The same over the totals."""

    def __init__(self, layers: Mapping[str, Gated], groups: list[Group]) -> None:
        super().__init__(layers)
        of = [layer.group_size for layer in layers.values()]
        gates = torch.tensor([layer.all_gates for layer in layers.values()], dtype=torch.float64)
        member = torch.tensor([[name in group.layers for name in layers] for group in groups])
        sizes = member * torch.tensor(of, dtype=torch.float64)
        totals = (sizes * gates).sum(1, keepdim=True)
        self.totals = totals.flatten().tolist()
        self.register_buffer("sizes", sizes, persistent=False)
        self.register_buffer("weights", sizes / totals, persistent=False)

    def costs(self, logits: Mapping[str, Tensor]) -> Tensor:
        counts = torch.stack(
            [torch.sigmoid(layer.own(logits[n])).sum() for n, layer in self.layers.items()]
        )
        return (self.sizes * counts).sum(1)

    def counted(self) -> tuple[Tensor, Tensor]:
        """Expected open gates [L] of each layer, differentiable, and `weights`."""
        weights: Tensor = self._buffers["weights"]  # type: ignore[assignment]  # each step's cost
        return expected_open(list(self.layers.values())).to(weights.dtype), weights

    def forward(self) -> Tensor:
        return shares(*self.counted())


class OwnMeasure(Measure):
    """A cost of the user's own, of the gates in one module."""

    def __init__(self, layers: Mapping[str, Gated], group: Group) -> None:
        super().__init__(layers)
        assert callable(group.measure)
        self.cost, self.title = group.measure, f"{measure_name(group.measure)}(open)"
        prefix = f"{group.whole}." if group.whole else ""
        self.names = {name: name.removeprefix(prefix) for name in group.layers}
        with torch.no_grad():
            full = {n: layer.own(torch.ones_like(layer.log_alpha)) for n, layer in layers.items()}
            self.totals = [float(self._cost(full))]
        expected = "a finite cost > 0 with every gate open"
        _checks.number(self.title, self.totals[0], expected, low=0.0, open_low=True)

    def _of_group(self) -> list[tuple[str, Gated]]:
        return [(name, self.layers[name]) for name in self.names]

    def _cost(self, opened: Mapping[str, Tensor]) -> Tensor:
        cost: Any = self.cost({short: opened[name] for name, short in self.names.items()})
        if not isinstance(cost, Tensor) or cost.dim():
            got = tuple(cost.shape) if isinstance(cost, Tensor) else type(cost).__name__
            _checks.refuse(self.title, got, "a 0-d tensor", TypeError)
        return cost

    def costs(self, logits: Mapping[str, Tensor]) -> Tensor:
        opened = {
            name: torch.sigmoid(layer.own(logits[name])).to(layer.log_alpha)
            for name, layer in self._of_group()
        }
        return self._cost(opened).reshape(1)

    def forward(self) -> Tensor:
        opened = {name: layer.own(layer.open_probability()) for name, layer in self._of_group()}
        return (self._cost(opened) / self.totals[0]).reshape(1)
