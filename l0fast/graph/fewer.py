"""A mixture of experts without some of them: what it has for each, and how that goes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.mixtures import ungated
from l0fast.layers.experts import CHILD, ExpertGate, Mixture
from l0fast.layers.serving import INDEX
from l0fast.layers.ties import GATES

_NUMBER = re.compile(r"(?!.*(_per|shared|top)).*experts")
"""Attributes that say how many experts there are."""


def mixture_of(name: str, gate: ExpertGate) -> Mixture:
    """What a gate is on, by the names in the model where the gate has this one."""
    return replace(gate.mixture, name=name.removesuffix(CHILD).removesuffix("."))


def expert_tensors(model: nn.Module, mixture: Mixture) -> list[tuple[str, str]]:
    """(module, name) of the tensors that have an expert at each place of their first dimension."""
    found: list[tuple[str, str]] = []
    held = [(mixture.path(mixture.router), 1)]
    held += [] if mixture.is_list else [(mixture.path(mixture.experts), 2)]
    for name, dims in held:
        module = model.get_submodule(name)
        for key, value in {**module._parameters, **module._buffers}.items():
            if value is None or key in (GATES, INDEX) or value.dim() < dims:
                continue
            if value.shape[0] == mixture.number:
                found.append((name, key))
    return found


def parameters_of(model: nn.Module, mixture: Mixture) -> int:
    """How many parameters an expert has, with its part of the router."""
    total = 0
    for name, key in expert_tensors(model, mixture):
        value = model.get_submodule(name)._parameters.get(key)
        total += 0 if value is None else value.numel() // mixture.number
    if mixture.is_list:
        named = model.get_submodule(mixture.expert(0)).named_parameters()
        total += sum(one.numel() for name, one in named if name.rpartition(".")[2] != GATES)
    return total


@dataclass(frozen=True)
class Fewer:
    """A mixture that loses experts; as JSON, a part of a cut (see `cuts`)."""

    mixture: Mixture
    kept: tuple[int, ...]
    """The places of those that stay."""
    everywhere: bool
    """Whether all mixtures of the model keep as many, so that a configuration can say it."""

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        return {**self.mixture.as_json(), "kept": list(self.kept), "everywhere": self.everywhere}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Fewer:
        """What such a dict says.

        Raises:
            ValueError, TypeError, KeyError: it is none.
        """
        own = {key: v for key, v in entry.items() if key not in ("kept", "everywhere")}
        found = cls(Mixture(**own), tuple(map(int, entry["kept"])), bool(entry["everywhere"]))
        places = list(found.kept)
        if found.as_json() != dict(entry) or places != sorted(set(places)) or not places:
            raise ValueError("an entry that contradicts itself")
        if places[0] < 0 or places[-1] >= found.mixture.number:
            raise ValueError("an expert that there is not")
        return found

    @property
    def dropped(self) -> tuple[str, tuple[int, ...]] | None:
        """(list of modules, places of what is taken out of it), where experts are modules."""
        mixture = self.mixture
        gone = tuple(i for i in range(mixture.number) if i not in self.kept)
        return (mixture.path(mixture.experts), gone) if mixture.is_list else None

    def part(self, value: Tensor) -> Tensor:
        """What is left of a tensor with an expert at each place of its first dimension."""
        return value.index_select(0, torch.tensor(self.kept, device=value.device))


def fewer_of(
    model: nn.Module, gates: Mapping[str, ExpertGate], kept: Mapping[str, Tensor]
) -> list[Fewer]:
    """Which mixtures lose experts.

    Args:
        model: they are in; it may have mixtures without gates, too, which stay as they are.
        gates: of mixtures, by name.
        kept: their gates that stay.
    """
    mixtures = {name: mixture_of(name, gate) for name, gate in gates.items()}
    gated = {one.path(one.experts) for one in mixtures.values()}
    numbers = {int(kept[name].sum()) for name in gates}
    losing = [name for name in gates if not bool(kept[name].all())]
    sizes = {mixtures[name].number for name in losing}
    everywhere = len(numbers) == 1 and not any(ungated(model, size, gated) for size in sizes)
    return [
        Fewer(mixtures[name], tuple(kept[name].nonzero().flatten().tolist()), everywhere)
        for name in losing
    ]


def set_number(owner: Any, old: int, new: int) -> None:
    """Changes the attributes of a module or configuration that say how many experts there are."""
    for key, value in list(vars(owner).items()):
        if type(value) is int and value == old and _NUMBER.match(key):
            setattr(owner, key, new)


def leave_(model: nn.Module, fewer: Fewer) -> None:
    """Takes experts out of a model, in place: it gets smaller tensors, not parts of those before.

    Raises:
        AttributeError: the model has no such mixture.
    """
    mixture, number = fewer.mixture, len(fewer.kept)
    for name, key in expert_tensors(model, mixture):
        module: Any = model.get_submodule(name)
        value = {**module._parameters, **module._buffers}[key]
        part = fewer.part(value.detach())
        if key in module._buffers:
            module._buffers[key] = part
        else:
            module._parameters[key] = nn.Parameter(part, value.requires_grad)
    router = model.get_submodule(mixture.path(mixture.router))
    if isinstance(router, nn.Linear):
        router.out_features = number
    if mixture.is_list:
        experts = model.get_submodule(mixture.path(mixture.experts))
        stay = [list(experts._modules.values())[i] for i in fewer.kept]
        experts._modules.clear()
        experts._modules.update((str(place), one) for place, one in enumerate(stay))
    around = model.get_submodule(mixture.name)
    gate = around._modules.get(CHILD)
    if isinstance(gate, ExpertGate):
        part = fewer.part(gate.log_alpha.detach())
        gate.log_alpha = nn.Parameter(part, gate.log_alpha.requires_grad)
        gate.mixture = replace(gate.mixture, number=number)
        gate.all_gates = number
    inside = (router, around, model.get_submodule(mixture.path(mixture.experts)))
    for module in inside:
        set_number(module, mixture.number, number)
    if fewer.everywhere:
        for owner in _around(model, mixture.name):
            set_number(owner, mixture.number, number)


def _around(model: nn.Module, name: str) -> Iterator[Any]:
    """The modules around one, and their configurations and its own."""
    parts = name.split(".") if name else []
    for size in range(len(parts) + 1):
        module = model.get_submodule(".".join(parts[:size]))
        yield module
        config = getattr(module, "config", None)
        if config is not None:
            yield config
