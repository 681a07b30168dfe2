"""The gates of a mixture's experts: a router that never picks a closed one.

While the mixture runs, its router gives -inf for closed experts, and what the last weights of each
expert give is multiplied by its gate (see `expert_hooks`). A mixture that has lost its closed
experts gives the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from l0fast.layers.part import PartGate
from l0fast.maths.hard_concrete import HardConcrete

CHILD = "expert_gate"
"""The name that the gates of a mixture have in the module around its router and experts."""


@dataclass(frozen=True)
class Mixture:
    """A router, and experts of which it picks some for each token."""

    name: str
    """Of the module around both."""
    router: str
    """The path in it to the module that gives a number for each expert."""
    experts: str
    """The path in it to the list of experts, or to the module whose weights have an expert at each
    place of their first dimension; "" for itself."""
    last: str | None
    """Of a list: the path in each expert to its last layer; None for weights together."""
    number: int
    """Of experts."""
    least: int
    """How many each token needs."""
    every: bool
    """Whether each expert computes all tokens, whatever the router picks."""

    def as_json(self) -> dict[str, Any]:
        """A dict that makes the same mixture."""
        return asdict(self)

    def path(self, relative: str) -> str:
        """The name of a module of the mixture in the model."""
        return ".".join(part for part in (self.name, relative) if part)

    def expert(self, place: object) -> str:
        """The name of one expert of a list."""
        return self.path(f"{self.experts}.{place}")

    @property
    def is_list(self) -> bool:
        """Whether each expert is a module."""
        return self.last is not None

    def hosts(self, around: nn.Module) -> Iterator[tuple[nn.Module, int | None]]:
        """The modules whose last weights are multiplied by gates, with the place of an expert, or
        None for all of them; `around` is the module of this name."""
        if self.last is None:
            yield around.get_submodule(self.experts), None
            return
        for place, expert in enumerate(around.get_submodule(self.experts).children()):
            yield expert.get_submodule(self.last), place


class ExpertGate(PartGate):
    """One hard-concrete gate for each expert of a mixture.

    Where z is 0 the router gives -inf, so that it never picks the expert; the `least` likeliest
    ones can be picked in any case. It is a child of the module around the router and the experts.

    Args:
        mixture: what it is on.
        like, group_size, density_init, distribution: as in `PartGate`.
    """

    gates = "expert"

    def __init__(
        self,
        mixture: Mixture,
        like: Tensor,
        group_size: int,
        density_init: float,
        distribution: HardConcrete | None = None,
    ) -> None:
        super().__init__(mixture.number, like, group_size, density_init, distribution)
        self.mixture, self.least = mixture, mixture.least

    def forward(self) -> tuple[Tensor, Tensor]:
        """z [experts] of this call, and bool [experts]: those that the router must not pick."""
        z = self._drawn()
        order = self.log_alpha.detach().argsort(descending=True, stable=True)
        return z, (z == 0).index_fill(0, order[: self.least], False)

    def extra_repr(self) -> str:
        return f"on {self.mixture.number} experts"


def last_weights(module: nn.Module, number: int) -> list[str]:
    """Of weights of several experts together, the names of the last one, and of its biases."""
    own = {key: one for key, one in module._parameters.items() if one is not None}
    sized = [key for key, one in own.items() if one.dim() > 1 and one.shape[0] == number]
    last = max(place for place, key in enumerate(sized) if own[key].dim() == 3)
    return sized[last:]


def scaled(value: Tensor, z: Tensor) -> Tensor:
    """Weights of several experts, each multiplied by its gate."""
    return value * z.to(value).view(-1, *[1] * (value.dim() - 1))


def expert_gates(layers: Any) -> dict[str, ExpertGate]:
    """Those of some layers with gates that are gates of experts, by name."""
    return {name: layer for name, layer in layers.items() if isinstance(layer, ExpertGate)}
