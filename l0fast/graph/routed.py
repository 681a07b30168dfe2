"""Which gates of experts the modules of a model depend on."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import Tensor

from l0fast.graph.fewer import mixture_of
from l0fast.layers.experts import ExpertGate, Mixture


class Routed:
    """The gates on experts, by number, and what they are on.

    Args:
        sites: the layers of the model.
        by_token: of what is done for each token: other experts do what a closed one did.
    """

    def __init__(self, sites: Collection[str], by_token: bool) -> None:
        self._sites, self._by_token = sites, by_token
        self._found: list[tuple[Tensor, Mixture]] = []
        self.routers: dict[str, tuple[Tensor, int]] = {}
        """Router that is a layer -> [out] the gates of what it picks, and how many stay."""

    def add(self, name: str, gate: object, own: Tensor) -> None:
        """Notes gates, of the numbers `own`, if they are on experts."""
        if not isinstance(gate, ExpertGate):
            return
        mixture = mixture_of(name, gate)
        self._found.append((own, mixture))
        if mixture.path(mixture.router) in self._sites:
            self.routers[mixture.path(mixture.router)] = own, mixture.least

    def __iter__(self) -> Iterator[tuple[Tensor, Mixture]]:
        return iter(self._found)

    def around(self, name: str) -> list[int]:
        """The gates of the experts that a module is in."""
        found: list[int] = []
        for own, mixture in self:
            start = mixture.expert("")
            place, _, _ = name.removeprefix(start).partition(".")
            if self.goes(mixture) and name.startswith(start) and place.isdigit():
                found.append(int(own[int(place)]))
        return found

    def goes(self, mixture: Mixture) -> bool:
        """Whether all of an expert goes with it, a module of its own."""
        return mixture.is_list and (mixture.every or not self._by_token)

    def shared(self, mixture: Mixture) -> list[str]:
        """The modules, other than layers, that have a part for each expert."""
        held = [mixture.router] if mixture.is_list else [mixture.experts, mixture.router]
        return [name for one in held if (name := mixture.path(one)) not in self.routers]
