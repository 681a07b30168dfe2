"""Sizes that a model's own code has written out: which attributes must follow, found by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice, product

from torch import nn

from l0fast.graph.liveness import Extent, Liveness
from l0fast.pruning.edits import AttributePatch

MERGED, EXCEPT = "merged", "merged except across reshapes"
MOST_OPTIONS = 64

Attempt = Callable[[dict[str, Extent], list[AttributePatch]], str]
"""(extents, patches) -> "" if the model then computes the same, or what is wrong."""


def _options(
    model: nn.Module, name: str, sizes: set[tuple[int, int]], before: set[str]
) -> Iterator[list[AttributePatch]]:
    """Ways to patch a module whose forward has sizes written out: none, as `before`, then others.

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
    found = [
        [patch for patch in chosen if patch is not None]
        for chosen in islice(product(*([*some, None] for some in choices)), MOST_OPTIONS)
    ]
    found.sort(key=lambda some: (bool(some), {patch.attribute for patch in some} != before))
    yield from found


def merged_tiers(
    model: nn.Module, live: Liveness, attempt: Attempt
) -> Iterator[tuple[str, list[str], list[AttributePatch]]]:
    """Plans that merge layers with their neighbours, the furthest first: name, rigid modules
    (see `Liveness.extents`), patches.

    The next one is for when the last one failed. Each module that views, splits or slices what
    shrinks is tried alone, without and with its attributes patched; where nothing helps, what it
    views stays there.
    """
    yield MERGED, [], []
    views = live.shrinking()
    patches: list[AttributePatch] = []
    rigid: list[str] = []
    last: set[str] = set()
    for name in views:
        extents = live.extents([other for other in views if other != name])
        options = _options(model, name, live.sizes(name), last)
        holds = next((option for option in options if not attempt(extents, option)), None)
        if holds is None:
            rigid.append(name)
        else:
            patches += holds
            last = {patch.attribute for patch in holds} or last
    yield EXCEPT if rigid else MERGED, rigid, patches
    yield EXCEPT, views, []
