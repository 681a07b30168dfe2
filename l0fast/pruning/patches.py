"""Sizes that a model's own code has written out: which attributes must follow, found by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import NamedTuple

from torch import nn

from l0fast.graph.liveness import Extent, Liveness
from l0fast.pruning.edits import AttributePatch

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


def _options(
    model: nn.Module, name: str, sizes: set[tuple[int, int]], before: set[str]
) -> Iterator[list[AttributePatch]]:
    """Ways to patch a module whose forward has sizes written out: none, as `before`, each attribute
    alone, then several.

    Any attribute that holds one of the sizes as an int may be where the forward has it from.
    """
    module = model.get_submodule(name)
    choices = [
        [
            AttributePatch(name, type(module).__name__, key, (after, size))
            for size, after in sorted(sizes)
            if size == value
        ]
        for key, value in vars(module).items()
        if type(value) is int and value in {size for size, _ in sizes}
    ]
    several = [
        [patch for patch in chosen if patch is not None]
        for chosen in islice(product(*([*some, None] for some in choices)), MOST_OPTIONS)
    ]
    yield []
    yield from (some for some in several if {patch.attribute for patch in some} == before)
    yield from ([patch] for some in choices for patch in some)
    yield from (some for some in several if len(some) > 1)


def _fewest(
    patches: list[AttributePatch], holds: Callable[[list[AttributePatch]], bool]
) -> list[AttributePatch]:
    """Patches that hold, without those that are not needed: what an attribute else stands for
    would be wrong after them."""
    for patch in list(patches) if len(patches) > 1 else []:
        rest = [other for other in patches if other is not patch]
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


def merged_tiers(
    model: nn.Module, live: Liveness, attempt: Attempt
) -> Iterator[tuple[str, list[str], list[AttributePatch]]]:
    """Plans that merge layers with their neighbours, the furthest first: name, rigid modules
    (see `Liveness.extents`), patches.

    The next one is for when the last one failed. Each module that views, splits or slices what
    shrinks, or in which a size is written out in another way, is tried alone, without and with its
    attributes patched; where nothing helps, what it views (or all that enters and leaves it) stays
    there, and other modules of its class are tried only as they are.
    """
    yield MERGED, [], []
    views = live.shrinking()
    _whole(live, views, attempt)
    patches: list[AttributePatch] = []
    rigid: list[str] = []
    last: set[str] = set()
    hopeless: set[type[nn.Module]] = set()
    parts = list(dict.fromkeys([*views, *live.whole]))
    for name in parts:
        extents = live.extents([other for other in parts if other != name])

        def holds(option: list[AttributePatch], extents: dict[str, Extent] = extents) -> bool:
            return not attempt(extents, option).failure

        kind = type(model.get_submodule(name))
        options = [[]] if kind in hopeless else _options(model, name, live.sizes(name), last)
        found = next((option for option in options if holds(option)), None)
        if found is None:
            rigid.append(name)
            hopeless.add(kind)
        else:
            found = _fewest(found, holds)
            patches += found
            last = {patch.attribute for patch in found} or last
    yield EXCEPT if rigid else MERGED, rigid, patches
    yield EXCEPT, parts, []
