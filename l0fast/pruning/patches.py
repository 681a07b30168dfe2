"""Sizes that a model's own code has written out: which attributes must follow, found by trial."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice, product

from torch import Tensor, nn

from l0fast.graph.liveness import Extent, Liveness
from l0fast.graph.views import ends_in, parts_in, sizes_in, views_of
from l0fast.pruning.attributes import AttributePatch, sizes_of
from l0fast.pruning.called import Calls
from l0fast.pruning.outcome import Outcome
from l0fast.pruning.views import Patch, view_patch

MERGED, EXCEPT = "merged", "merged except across reshapes"
MOST_OPTIONS = 64
MOST_JOINED = 3
"""How often a group of modules may be tried again with those where it was seen to fail."""
MOST_WHOLE = 8
"""How many modules may be found that need all of what enters and leaves them."""


Attempt = Callable[[dict[str, Extent], list[Patch]], Outcome]
"""(extents, patches) -> what comes of them."""


def _choices(
    model: nn.Module, live: Liveness, names: list[str], present: Tensor
) -> list[list[list[AttributePatch]]]:
    """For each attribute that may hold a size in some modules of one class: ways to patch it in all
    of them at once.

    Any attribute that holds one of the sizes as an int, or those of all parts of a split, may be
    where the forward has it from. Where a slice is cut comes first: no other size is meant there.
    """
    found: dict[str, list[list[AttributePatch]]] = {}
    """Attribute -> for each module that may need it, the patches that would do."""
    for name in names:
        module = model.get_submodule(name)
        found_in = (of(live, name, present) for of in (ends_in, sizes_in, parts_in))
        sizes = list(dict.fromkeys(chain.from_iterable(map(sorted, found_in))))
        for key, value in sizes_of(module):
            fits = [
                AttributePatch(name, type(module).__name__, key, (after, size))
                for size, after in sizes
                if size == value
            ]
            if fits:
                found.setdefault(key, []).append(fits)
    ways: list[list[list[AttributePatch]]] = []
    for parts in found.values():
        number = max(map(len, parts))
        ways.append([[fits[min(i, len(fits) - 1)] for fits in parts] for i in range(number)])
    return ways


def _attributes(patches: Sequence[Patch]) -> set[str]:
    return {patch.attribute for patch in patches if isinstance(patch, AttributePatch)}


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


class _Release:
    """Takes modules, one group after the other, from those that stay rigid.

    Args:
        model: of full size.
        live: what is left of its units.
        attempt: tries a draft.
        parts: the modules that may have sizes written out.
        anew: modules may be made anew.

    Attributes:
        parts: the same, with those that turned out to be among them.
        free: those that are no longer rigid.
        patches: of their attributes and views.
        reasons: why modules cannot be made anew.
    """

    def __init__(
        self,
        model: nn.Module,
        live: Liveness,
        attempt: Attempt,
        parts: list[str],
        anew: bool,
    ) -> None:
        self._model, self._live, self._attempt = model, live, attempt
        self._anew, self._calls = anew, Calls()
        self.parts, self.free = parts, set[str]()
        self.patches: list[Patch] = []
        self.reasons: dict[str, str] = {}
        self._last: set[str] = set()
        trace = live.walk.trace
        self._filling = list(dict.fromkeys(trace.callers[node] for node in trace.filled))
        self._hopeless: set[type[nn.Module]] = set()

    def kind(self, name: str) -> type[nn.Module]:
        """The class of a module."""
        return type(self._model.get_submodule(name))

    @property
    def rigid(self) -> list[str]:
        """The modules that must stay rigid."""
        return [name for name in self.parts if name not in self.free]

    def _patched(self, group: list[str]) -> tuple[list[Patch] | None, list[str]]:
        """The patches with which a group can be free, beside those that are; or None, and where
        failures were noticed."""
        live, places = self._live, list[str]()
        # What others are free to do, they do now: a tensor that they fill is read by this group.
        group = [*group, *(n for n in self._filling if n in self.free and n not in group)]
        rigid = [name for name in self.rigid if name not in group]
        others = [patch for patch in self.patches if patch.name not in group]
        extents, present = live.extents(rigid), live.present(rigid)

        def holds(option: Sequence[Patch]) -> bool:
            outcome = self._attempt(extents, [*others, *option])
            if outcome.failure and outcome.place is not None:
                places.append(outcome.place)
            return not outcome.failure

        hopeless = all(self.kind(name) in self._hopeless for name in group)
        choices = [] if hopeless else _choices(self._model, live, group, present)
        options = _options(choices, self._last)
        found = next((option for option in options if holds(option)), None)
        if found is not None:
            return [*others, *_fewest(found, holds)], places
        anew = [] if hopeless else self._made_anew(group, present)
        return [*others, *anew] if anew and holds(anew) else None, places

    def notes(self) -> list[str]:
        """Says of the modules that stay rigid why they cannot be made anew."""
        by: dict[str, list[str]] = {}
        for name in self.rigid:
            if name in self.reasons:
                by.setdefault(self.reasons[name], []).append(name or "the model itself")
        return [
            f"the forward of {', '.join(names)} cannot be written again with smaller sizes: {why}"
            for why, names in by.items()
        ]

    def _made_anew(self, group: list[str], present: Tensor) -> list[Patch]:
        """The patches that make each module of a group anew whose views get smaller."""
        if not self._anew:
            return []
        modules = {name: self._model.get_submodule(name) for name in group}
        with self._calls.of([m for m in modules.values() if m not in self._calls]):
            if not all(module in self._calls for module in modules.values()):
                self._attempt(self._live.extents(list({*self.parts, *group})), [])
        patches: list[Patch] = []
        for name, module in modules.items():
            views = views_of(self._live, name, present)
            try:
                patch = view_patch(name, module, self._calls, views)
            except ValueError as reason:
                self.reasons[name] = str(reason)
            else:
                patches += [] if patch is None else [patch]
        return patches

    def _joined(self, group: list[str], places: list[str]) -> list[str]:
        """A group with the modules where it was seen to fail, and all parts of their classes."""
        new = [place for place in dict.fromkeys(places) if place not in group]
        kinds = {self.kind(name) for name in new}
        same = [name for name in self.parts if self.kind(name) in kinds]
        return list(dict.fromkeys([*group, *same, *new]))

    def try_(self, group: list[str], alone: bool = False) -> bool:
        """Frees a group, if need be together with the modules where it was seen to fail.

        Where a size is checked outside of views, as in `assert x.shape[1] == self.channels`, it is
        seen only once the modules before it are free.

        Args:
            group: modules.
            alone: no others join it.
        """
        whole = list(self._live.whole)
        for _ in range(1 if alone else MOST_JOINED):
            patches, places = self._patched(group)
            if patches is not None:
                self._last = _attributes([p for p in patches if p.name in group]) or self._last
                self.patches = patches
                self.free.update(group)
                self.parts = list(dict.fromkeys([*self.parts, *group]))
                return True
            joined = self._joined(group, places)
            if joined == group:
                break
            self._live.whole += [name for name in joined if name not in self.parts]
            group = joined
        self._live.whole = whole
        return False

    def all(self) -> None:
        """Frees what can be: all modules of a class together, else each of them alone; those of a
        class that nothing has helped are tried as they are."""
        kinds: dict[type[nn.Module], list[str]] = {}
        for name in self.parts:
            kinds.setdefault(self.kind(name), []).append(name)
        for kind, names in kinds.items():
            if self.free.issuperset(names) or self.try_(names):
                continue
            for name in names if len(names) > 1 else ():
                if name not in self.free and not self.try_([name], alone=True):
                    self._hopeless.add(kind)


def merged_tiers(
    model: nn.Module, live: Liveness, attempt: Attempt, notes: list[str], anew: bool = True
) -> Iterator[tuple[str, list[str], list[Patch]]]:
    """Plans that merge layers with their neighbours, the furthest first: name, rigid modules
    (see `Liveness.extents`), patches.

    The next one is for when the last one failed. The modules that view, split or slice what
    shrinks, or in which a size is written out in another way, are tried class by class, without
    and with their attributes patched; where nothing helps, what they view (or all that enters and
    leaves them) stays there.
    """
    yield MERGED, [], []
    views = live.shrinking()
    _whole(live, views, attempt)
    release = _Release(model, live, attempt, list(dict.fromkeys([*views, *live.whole])), anew)
    release.all()
    rigid = release.rigid
    notes += release.notes()
    yield EXCEPT if rigid else MERGED, rigid, release.patches
    yield EXCEPT, release.parts, []
