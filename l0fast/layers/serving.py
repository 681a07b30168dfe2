"""Which gates a layer has, and which of its inputs each of them serves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast import _checks

INDEX = "gate_index"
ON_UNITS = ("input", "output")
"""What gates on units are on; others are on single weights, branches or experts."""


class Share(NamedTuple):
    """What one layer has of gates that several share, which do not all have the same ones; or of
    gates that each serve inputs in several places."""

    index: tuple[int, ...]
    """[num_gates] the place of each of its gates among all, in the order of its inputs: one that
    serves several inputs, which do not lie together, is there as often."""
    total: int
    """How many gates there are."""

    def check(self, gates: str, blocks: int) -> None:
        """Refuses what is no part of `total` gates for so many blocks of inputs."""
        expected = f"{blocks} gates on inputs, each of {self.total}"
        if gates != "input" or len(self.index) != blocks:
            _checks.refuse("share", f"{len(self.index)} gates on {gates}s", expected)
        if not 0 <= min(self.index) <= max(self.index) < self.total:
            _checks.refuse("share", (min(self.index), max(self.index)), expected)

    def places(self, device: torch.device) -> Tensor:
        """The same as a tensor."""
        return torch.tensor(self.index, device=device)


def drop_index(layer: nn.Module) -> None:
    """Takes from a layer, or from a copy of one, what `Serving.set_index` gave it."""
    layer._buffers.pop(INDEX, None)
    layer._non_persistent_buffers_set.discard(INDEX)


class Serving:
    """A layer with gates: those in its log_alpha, or some of them where other layers share it."""

    log_alpha: nn.Parameter
    gates: str
    units: int
    """How many consecutive inputs each gate serves; 1 for gates that are not on inputs."""
    least: int = 1
    """How many gates stay in any case."""
    _buffers: dict[str, Tensor | None]
    _non_persistent_buffers_set: set[str]

    @property
    def gate_index(self) -> Tensor | None:
        """[num_gates] the places of its gates in log_alpha, see `Share`; None: it has them all, in
        order."""
        return self._buffers.get(INDEX)

    @property
    def num_gates(self) -> int:
        """How many gates the layer has; one that serves several places counts for each."""
        index = self.gate_index
        return self.log_alpha.numel() if index is None else index.numel()

    def set_index(self, index: Tensor) -> None:
        """Says where its gates are in log_alpha. It is no part of a state: structure tells it."""
        self._buffers[INDEX] = index
        self._non_persistent_buffers_set.add(INDEX)

    def own(self, values: Any) -> Tensor:
        """What each of its gates has, [..., num_gates], of what each in log_alpha has."""
        index = self.gate_index
        return values if index is None else values.index_select(-1, index.to(values.device))

    def spread(self, values: Tensor) -> Tensor:
        """What each gate in log_alpha has, for each of the units that the layer's gates serve."""
        own = self.own(values)
        return own if self.units == 1 else own.repeat_interleave(self.units, -1)

    def places(self) -> Tensor:
        """[num_gates] the places of its gates in log_alpha, flattened."""
        return self.own(torch.arange(self.log_alpha.numel(), device=self.log_alpha.device))


def alike(layers: Iterable[Serving]) -> list[Tensor]:
    """The places of the gates in the log_alpha that some layers share: each part of it that the
    same layers have."""
    layers = list(layers)
    number = layers[0].log_alpha.numel()
    if all(layer.gate_index is None for layer in layers):
        return [torch.arange(number)]
    has = torch.zeros(number, len(layers), dtype=torch.bool)
    for column, layer in enumerate(layers):
        has[layer.places().cpu(), column] = True
    part = has.unique(dim=0, return_inverse=True)[1]
    return [(part == one).nonzero().flatten() for one in part.unique()]


def likeliest(layers: Iterable[Serving], scores: Tensor) -> Tensor:
    """bool, of the shape of the log_alpha that some layers share: the gates with the highest scores
    of each part that the same layers have, `least` of them.

    They are kept in any case: without them a layer would read nothing, or a unit that its maker
    must keep would arrive at readers that do not want it. A branch may be gone; of experts as many
    are kept as each token needs.
    """
    layers = list(layers)
    found = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    for part in alike(layers):
        places = part.to(scores.device)
        order = scores.flatten()[places].argsort(descending=True, stable=True)
        found[places[order[: layers[0].least]]] = True
    return found.view(scores.shape)
