"""Sizes that a model's own code has written out: which attributes must follow, found by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import NamedTuple

from torch import nn

from l0fast.graph.liveness import Extent, Liveness
from l0fast.pruning.attributes import AttributePatch, sizes_in

MERGED, EXCEPT = "merged", "merged except across reshapes"
MOST_OPTIONS = 64
MOST_WHOLE = 8
"""How many modules may be found that need all of what enters and leaves them."""


class Outcome(NamedTuple):
    """What came of trying a draft."""

    error: float
    """The largest relative error."""
    failure: str = ""
    """What is wrong, "" for nothing."""
    place: str | None = None
    """The module in which it was noticed, if that is known."""


Attempt = Callable[[dict[str, Extent], list[AttributePatch]], Outcome]
"""(extents, patches) -> what comes of them."""


def _choices(
    model: nn.Module, live: Liveness, names: list[str]
) -> list[list[list[AttributePatch]]]:
    """For each attribute that may hold a size in some modules of one class: ways to patch it in all
    of them at once.

    Any attribute that holds one of the sizes as an int, or those of all parts of a split, may be
    where the forward has it from.
    """
    found: dict[str, list[list[AttributePatch]]] = {}
    """Attribute -> for each module that may need it, the patches that would do."""
    for name in names:
        module = model.get_submodule(name)
        sizes = [*sorted(live.sizes(name)), *sorted(live.parts(name))]
        for key, value in vars(module).items():
            fits = [
                AttributePatch(name, type(module).__name__, key, (after, size))
                for size, after in sizes
                if size == sizes_in(value)
            ]
            if fits:
                found.setdefault(key, []).append(fits)
    ways: list[list[list[AttributePatch]]] = []
    for parts in found.values():
        number = max(map(len, parts))
        ways.append([[fits[min(i, len(fits) - 1)] for fits in parts] for i in range(number)])
    return ways


def _attributes(patches: list[AttributePatch]) -> set[str]:
    return {patch.attribute for patch in patches}


def _options(
    choices: list[list[list[AttributePatch]]], before: set[str]
) -> Iterator[list[AttributePatch]]:
    """Ways to patch modules whose forward has sizes written out: none, as `before`, each attribute
    alone, then several."""
    several = [
        [patch for way in chosen if way is not None for patch in way]
        for chosen in islice(product(*([*ways, None] for ways in choices)), MOST_OPTIONS)
    ]
    yield []
    yield from (some for some in several if _attributes(some) == before)
    yield from (way for ways in choices for way in ways)
    yield from (some for some in several if len(_attributes(some)) > 1)


def _fewest(
    patches: list[AttributePatch], holds: Callable[[list[AttributePatch]], bool]
) -> list[AttributePatch]:
    """Patches that hold, without the attributes that are not needed: what they stand for else would
    be wrong after them."""
    several = _attributes(patches)
    for name in sorted(several) if len(several) > 1 else []:
        rest = [patch for patch in patches if patch.attribute != name]
        if holds(rest):
            patches = rest
    return patches


def _whole(live: Liveness, views: list[str], attempt: Attempt) -> None:
    """Finds the modules outside of whose views a size is written out, as in a check of it: all
    that enters and leaves them stays.

    Tried with all views left as they are: first the module where a failure was noticed, then the
    ones around it.
    """
    for _ in range(MOST_WHOLE):
        outcome = attempt(live.extents([*views, *live.whole]), [])
        if not outcome.failure or outcome.place is None:
            return
        around = outcome.place
        while around in live.whole and around:
            around = around.rpartition(".")[0]
        if around in live.whole:
            return
        live.whole.append(around)


def _released(
    model: nn.Module, live: Liveness, attempt: Attempt, groups: list[list[str]]
) -> tuple[list[str], list[AttributePatch]]:
    """Tries modules of one class that may lose what they view, group by group, with all others
    rigid: those that must stay rigid, and the patches of the others.

    Where nothing helps one group, other groups of its class are tried only as they are.
    """
    parts = [name for group in groups for name in group]
    patches: list[AttributePatch] = []
    rigid: list[str] = []
    last: set[str] = set()
    hopeless: set[type[nn.Module]] = set()
    for group in groups:
        extents = live.extents([other for other in parts if other not in group])

        def holds(option: list[AttributePatch], extents: dict[str, Extent] = extents) -> bool:
            return not attempt(extents, option).failure

        kind = type(model.get_submodule(group[0]))
        choices = [] if kind in hopeless else _choices(model, live, group)
        found = next((option for option in _options(choices, last) if holds(option)), None)
        if found is None:
            rigid += group
            hopeless.add(kind)
        else:
            found = _fewest(found, holds)
            patches += found
            last = _attributes(found) or last
    return rigid, patches


def merged_tiers(
    model: nn.Module, live: Liveness, attempt: Attempt
) -> Iterator[tuple[str, list[str], list[AttributePatch]]]:
    """Plans that merge layers with their neighbours, the furthest first: name, rigid modules
    (see `Liveness.extents`), patches.

    The next one is for when the last one failed. Each module that views, splits or slices what
    shrinks, or in which a size is written out in another way, is tried alone, without and with its
    attributes patched; where nothing helps, what it views (or all that enters and leaves it) stays
    there. Where units go through several such modules none of them loses any alone: then all
    modules of a class are tried together.
    """
    yield MERGED, [], []
    views = live.shrinking()
    _whole(live, views, attempt)
    parts = list(dict.fromkeys([*views, *live.whole]))
    rigid, patches = _released(model, live, attempt, [[name] for name in parts])
    yield EXCEPT if rigid else MERGED, rigid, patches
    kinds: dict[type[nn.Module], list[str]] = {}
    for name in parts:
        kinds.setdefault(type(model.get_submodule(name)), []).append(name)
    if len(kinds) < len(parts):
        rigid, patches = _released(model, live, attempt, list(kinds.values()))
        yield EXCEPT if rigid else MERGED, rigid, patches
    yield EXCEPT, parts, []
