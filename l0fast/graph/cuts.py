"""Branches cut out of a model: stand-ins in the place of their modules, and whole blocks taken out
of the lists that hold them. The number of layers follows, and so do their places in a cache. And
experts taken out of mixtures."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from dataclasses import replace as replaced
from typing import Any

from torch import nn

from l0fast.graph.branches import Branch
from l0fast.graph.caches import KINDS, configurations, renumber_, with_index
from l0fast.graph.fewer import Fewer, leave_, set_number
from l0fast.graph.sites import replace
from l0fast.graph.standins import StandIn

NUMBER = "num_hidden_layers"
"""What a configuration says of the layers."""


@dataclass(frozen=True)
class Cut:
    """Which branches and experts are cut out, and how; as JSON, an entry of the report."""

    branches: tuple[str, ...] = ()
    """Their names."""
    modules: tuple[StandIn, ...] = ()
    """What takes the place of modules."""
    dropped: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """(list of modules, places of what is taken out of it)."""
    after: tuple[int, int, int] = (0, 0, 0)
    """How many entries of the recipe's `layers`, `attributes` and `views` came before."""
    experts: tuple[Fewer, ...] = ()
    """The mixtures that lose experts."""

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        experts = {"experts": [one.as_json() for one in self.experts]} if self.experts else {}
        return {
            "branches": list(self.branches),
            "modules": [stand.as_json() for stand in self.modules],
            "dropped": {name: list(places) for name, places in self.dropped},
            "after": list(self.after),
            **experts,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Cut:
        """The cut of a report's entry.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is none.
        """
        cut = cls(
            tuple(map(str, entry["branches"])),
            tuple(map(StandIn.from_json, entry["modules"])),
            tuple((name, tuple(map(int, places))) for name, places in entry["dropped"].items()),
            (int(entry["after"][0]), int(entry["after"][1]), int(entry["after"][2])),
            tuple(map(Fewer.from_json, entry.get("experts", []))),
        )
        if cut.as_json() != dict(entry):
            raise ValueError("an entry that contradicts itself")
        return cut

    @property
    def lists(self) -> list[tuple[str, tuple[int, ...]]]:
        """(list of modules, places of what is taken out of it), of blocks and of experts."""
        experts = [one.dropped for one in self.experts if one.dropped is not None]
        return [*self.dropped, *experts]

    def takes(self, name: str) -> bool:
        """Whether a module, or a tensor, of the whole model is gone."""
        gone = [stand.name for stand in self.modules]
        gone += [f"{holder}.{place}" for holder, places in self.lists for place in places]
        return any(f"{name}.".startswith(f"{one}.") for one in gone)

    def old(self, name: str) -> str:
        """The name that a module, or a tensor, of the cut model had before."""
        # From the outside in: the name of an inner list is that of the whole model.
        for holder, gone in sorted(self.lists, key=lambda one: one[0].count(".")):
            if name.startswith(f"{holder}."):
                place, _, rest = name.removeprefix(f"{holder}.").partition(".")
                stays = (i for i in range(int(place) + len(gone) + 1) if i not in gone)
                old = next(i for number, i in enumerate(stays) if number == int(place))
                name = f"{holder}.{old}.{rest}".rstrip(".")
        return name


def _listed(model: nn.Module, name: str) -> bool:
    """Whether a module is one of a list of modules, which are numbered."""
    holder, _, place = name.rpartition(".")
    module = model.get_submodule(holder)
    return place.isdigit() and isinstance(module, (nn.ModuleList, nn.Sequential))


def plan_cut(
    model: nn.Module,
    branches: Iterable[Branch],
    drop: bool,
    after: tuple[int, int, int] = (0, 0, 0),
    experts: Iterable[Fewer] = (),
) -> Cut:
    """How some branches of a model are cut out.

    Args:
        model: whose branches they are.
        branches: those that are closed.
        drop: whether blocks that add nothing go, out of the lists that hold them where these do;
            else the branches alone.
        after, experts: see `Cut`; experts of mixtures that are gone do not count.
    """
    branches = list(branches)
    closed = {one.name for one in branches}
    stands = {stand.name: stand for one in branches for stand in one.modules}
    dropped: dict[str, set[int]] = {}
    if drop:
        for one in branches:
            if one.block is not None and closed.issuperset(one.members):
                holder, _, place = one.block.name.rpartition(".")
                if _listed(model, one.block.name):
                    dropped.setdefault(holder, set()).add(int(place))
                else:
                    stands[one.block.name] = one.block
    gone = [f"{holder}.{place}" for holder, places in dropped.items() for place in places]
    outer = [
        stand
        for name, stand in stands.items()
        if not any(f"{name}.".startswith(f"{other}.") for other in gone)
        and not any(name.startswith(f"{other}.") for other in stands)
    ]
    # A list inside what is dropped goes with it.
    lists = [
        (holder, tuple(sorted(places)))
        for holder, places in dropped.items()
        if not any(f"{holder}.".startswith(f"{other}.") for other in gone)
    ]
    cut = Cut(tuple(sorted(closed)), tuple(outer), tuple(lists), after)
    return replaced(cut, experts=tuple(one for one in experts if not cut.takes(one.mixture.name)))


def cut_(model: nn.Module, cut: Cut) -> nn.Module:
    """Carries a cut out, in place; returns the root.

    Raises:
        AttributeError: the model has no such module.
    """
    for fewer in cut.experts:
        leave_(model, fewer)
    indexed = with_index(model)
    old = {id(model.get_submodule(stand.name)): stand.module() for stand in cut.modules}
    for new, stand in zip(old.values(), cut.modules, strict=True):
        new.train(model.get_submodule(stand.name).training)
    model = replace(model, old)
    for holder, gone in cut.dropped:
        parts = model.get_submodule(holder)
        kept = [i for i in range(len(parts._modules)) if i not in gone]
        for config in configurations(model, holder):
            if getattr(config, NUMBER, None) != len(parts._modules):
                continue
            kinds = getattr(config, KINDS, None)
            setattr(config, NUMBER, len(kept))
            if kinds is not None and len(kinds) == len(parts._modules):
                setattr(config, KINDS, [kinds[i] for i in kept])
        modules = list(parts._modules.values())
        parts._modules.clear()
        parts._modules.update((str(new), modules[i]) for new, i in enumerate(kept))
    if cut.modules or cut.dropped:
        renumber_(model, indexed)
    return model


def cut_names(model: nn.Module, cut: Cut) -> dict[str, str]:
    """Name of each module of a cut model that was there before -> the name that it had."""
    new = {stand.name for stand in cut.modules}
    named = ((name, cut.old(name)) for name, _ in model.named_modules())
    return {
        name: old
        for name, old in named
        if not any(f"{old}.".startswith(f"{stand}.") for stand in new)
    }


def before_cuts(model: nn.Module, cuts: Iterable[Cut]) -> Any:
    """The configuration that a model had before it was cut; a copy.

    The kinds of layers that are gone are those of their neighbours.

    Args:
        model: with a configuration, as the cuts have left it.
        cuts: in the order in which they were made.
    """
    config: Any = model.config
    own = {id(one): one for one in (config, *vars(config).values()) if hasattr(one, "to_dict")}
    twins = copy.deepcopy(list(own.values()))
    twin_of = dict(zip(own, twins, strict=True))
    numbers: dict[str, int] = {}
    for cut in reversed(list(cuts)):
        for fewer in (one for one in cut.experts if one.everywhere):
            for twin in twins:
                set_number(twin, len(fewer.kept), fewer.mixture.number)
        for holder, gone in cut.dropped:
            left = numbers.get(holder, len(model.get_submodule(holder)._modules))
            numbers[holder] = left + len(gone)
            for one in configurations(model, holder):
                _with_layers(twin_of[id(one)], left, gone)
    return twins[0]


def _with_layers(config: Any, left: int, gone: Iterable[int]) -> None:
    if getattr(config, NUMBER, None) != left:
        return
    kinds = getattr(config, KINDS, None)
    if kinds is not None and len(kinds) == left:
        kinds = list(kinds)
        for place in sorted(gone):
            kinds.insert(place, kinds[min(place, len(kinds) - 1)])
        setattr(config, KINDS, kinds)
    setattr(config, NUMBER, left + len(list(gone)))
