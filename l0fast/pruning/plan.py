"""From gates to edits: what each layer keeps, how that is carried out, and what is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from l0fast import _checks
from l0fast.graph.capture import layer_size
from l0fast.graph.liveness import Extent, Liveness, local_extents
from l0fast.graph.sites import Site, is_held
from l0fast.graph.structure import Structure
from l0fast.graph.walk import Walk
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.pruning.adapters import sizes_around
from l0fast.pruning.attributes import AttributePatch
from l0fast.pruning.draft import Draft
from l0fast.pruning.edits import Edit
from l0fast.pruning.gated_sites import gated_sites
from l0fast.pruning.outcome import Outcome, unseen_in_words
from l0fast.pruning.patches import merged_tiers
from l0fast.pruning.views import Patch, ViewPatch

ALONE = "each layer by itself"

Check = Callable[[Draft], Outcome]
"""What comes of a draft."""


@dataclass(frozen=True, eq=False)
class Plan:
    """How closed gates are carried out; it has been checked."""

    tier: str
    edits: tuple[Edit, ...]
    patches: tuple[Patch, ...]
    extents: Mapping[str, Extent]
    sites: Mapping[str, Site]
    error: float
    """What the check found."""
    notes: tuple[str, ...]
    """What was undone, and why."""
    scaled: frozenset[str]
    """Layers whose gates are a factor on their units: they do not get smaller by them."""
    constants: Mapping[str, Tensor]
    """Layer -> what goes into its bias, see `edits.edited`; where anything does."""
    live: Liveness | None
    """What the extents come from; None if each layer is planned by itself."""
    rigid: tuple[str, ...]
    """Modules in whose forward sizes are written out, see `Liveness.extents`."""

    @property
    def attributes(self) -> list[AttributePatch]:
        """The patches of attributes."""
        return [patch for patch in self.patches if isinstance(patch, AttributePatch)]

    @property
    def views(self) -> list[ViewPatch]:
        """The modules that are made anew."""
        return [patch for patch in self.patches if isinstance(patch, ViewPatch)]

    @property
    def shrinking(self) -> list[str]:
        """The layers that closed gates can make smaller."""
        return [
            name
            for name, site in self.sites.items()
            if site.local or (self.live is not None and not (site.fixed or is_held(site)))
        ]

    @property
    def held(self) -> list[str]:
        """The tensors of other modules that they can make smaller."""
        sites = self.sites.items() if self.live is not None else ()
        return [name for name, site in sites if is_held(site) and not site.fixed]


def edit_of(site: Site, extent: Extent, scale: str | None = None) -> Edit | None:
    """The edit that gives a layer its extent, or None if nothing changes."""

    def part(mask: Tensor) -> tuple[int, ...] | None:
        return None if bool(mask.all()) else tuple(mask.nonzero().flatten().tolist())

    def move(inner: Tensor, outer: Tensor) -> tuple[tuple[int, ...], int] | None:
        positions = part(inner[outer])
        return None if positions is None else (positions, int(outer.sum()))

    edit = Edit(
        site.name,
        site.kind,
        layer_size(site.layer),
        part(extent.columns),
        part(extent.rows),
        move(extent.columns, extent.arrives),
        move(extent.rows, extent.leaves),
        scale,
    )
    plain = (edit.inputs, edit.outputs, edit.gather, edit.scatter, edit.scale)
    return None if all(value is None for value in plain) else edit


def constants_of(extents: Mapping[str, Extent]) -> dict[str, Tensor]:
    """What goes into the biases of layers, where anything does."""
    found = {name: extent.constants for name, extent in extents.items()}
    return {name: c for name, c in found.items() if c is not None and bool(c.any())}


class _Planner:
    """Tries plans out on a draft, the furthest-reaching first."""

    def __init__(self, draft: Draft, structure: Structure, check: Check, anew: bool) -> None:
        self.draft, self.values, self.check, self.anew = draft, draft.values, check, anew
        self.structure = structure
        self.trace, self.training = structure.trace, structure.training
        self.notes: list[str] = []
        if structure.in_parts:
            self.notes.append(f"layers are merged {structure.in_parts}")
        elif structure.failure:
            refusal = f"torch.export refuses the model: {structure.failure}"
            self.notes.append(f"layers are not merged, {refusal}")
        self.fixed: dict[str, str] = {}
        """Layers that stay full, and why."""
        self.sites: dict[str, Site] = {}

    def attempt(
        self,
        edits: Iterable[Edit],
        patches: Iterable[Patch] = (),
        constants: Mapping[str, Tensor] | None = None,
    ) -> Outcome:
        """What comes of some edits."""
        try:
            self.draft.make_smaller(edits, patches, constants)
            return self.check(self.draft)
        except Exception as failure:
            return Outcome.of(failure, self.draft.model)

    def trial(self, extents: Mapping[str, Extent], patches: Iterable[Patch]) -> Outcome:
        """What comes of some extents; afterwards the draft is of full size, as it was."""
        outcome = self.attempt(self.edits_of(extents), patches, constants_of(extents))
        self.draft.undo()
        return outcome

    def edits_of(self, extents: Mapping[str, Extent]) -> list[Edit]:
        """What gives every layer its extent."""
        layers, factors = self.values.layers, self.draft.factors
        scales = {name: layers[name].gates for name in factors}
        pairs = ((site, extents[name]) for name, site in self.sites.items())
        edits = [edit_of(site, extent, scales.get(site.name)) for site, extent in pairs]
        return [edit for edit in edits if edit is not None]

    def plan(self) -> Plan | None:
        """The first plan that holds with the layers that are not fixed; None if none does."""
        self.sites = gated_sites(self.draft, self.values, self.trace, self.fixed)
        live: Liveness | None = None
        tiers: Iterable[tuple[str, list[str], list[Patch]]] = []
        if self.trace is not None:
            sites = self.sites.values()
            also = None if self.training is None else Walk(self.training, sites)
            live = Liveness(Walk(self.trace, sites), also)
            self.draft.undo()
            tiers = merged_tiers(self.draft.model, live, self.trial, self.notes, self.anew)
        tried: list[tuple[list[Edit], list[Patch]]] = []
        undone: dict[str, str] = {}
        for tier, rigid, patches in chain(tiers, [(ALONE, [], [])]):
            merges = live if tier != ALONE else None
            if merges is None:
                extents = local_extents(self.sites.values())
            else:
                extents = merges.extents(rigid)
            edits = self.edits_of(extents)
            patches = [*patches, *sizes_around(self.draft.source, edits)]
            if (edits, patches) in tried:
                continue
            tried.append((edits, patches))
            constants = constants_of(extents)
            outcome = self.attempt(edits, patches, constants)
            if not outcome.failure:
                undone.pop(tier, None)
                notes = [f"{other}: undone, {failure}" for other, failure in undone.items()]
                if edits and merges is not None:
                    notes += unseen_in_words(self.structure.unseen(self.sites))
                return Plan(
                    tier=tier,
                    edits=tuple(edits),
                    patches=tuple(patches),
                    extents=extents,
                    sites=self.sites,
                    error=outcome.error,
                    notes=(*self.notes, *notes),
                    scaled=frozenset(self.draft.factors),
                    constants=constants,
                    live=merges,
                    rigid=tuple(rigid),
                )
            undone.setdefault(tier, outcome.failure)
        for tier, failure in undone.items():
            note = f"{tier}: undone, {failure}"
            if note not in self.notes:
                self.notes.append(note)
        return None

    def _is_needed(self, edit: Edit) -> bool:
        """Whether the model of full size has an edit, too: gates that no weight can hold."""
        layer = self.values.layers.get(edit.name)
        return edit.scale is not None or isinstance(layer, GatedRMSNorm)

    def full_size(self) -> tuple[list[Edit], list[Edit], str]:
        """The edits that the model of full size has, those that it does without, and what is wrong
        with it; "" for nothing."""
        self.sites = gated_sites(self.draft, self.values, self.trace, self.fixed)
        edits = self.edits_of(local_extents(self.sites.values()))
        needed = [edit for edit in edits if self._is_needed(edit)]
        rest = [edit for edit in edits if not self._is_needed(edit)]
        return needed, rest, self.attempt(needed).failure

    def fix_what_fails(self) -> None:
        """Finds the layers that cannot get smaller, each by itself, and keeps them full.

        Raises:
            ValueError: not even the model of full size computes what the gated one does.
        """
        base, rest, failure = self.full_size()
        if failure:
            _checks.refuse(
                "model",
                f"{type(self.draft.model).__name__}, whose gates cannot be folded ({failure})",
                "a model that reads the weights of its layers only by calling them",
            )
        each = {edit.name: self.attempt([*base, edit]).failure for edit in rest}
        faults = {name: failure for name, failure in each.items() if failure}
        for name in faults or each:
            self.fixed[name] = f"made smaller: {each[name] or 'it fails together with others'}"


def fault_of(draft: Draft, structure: Structure, check: Check) -> str:
    """What is wrong with a draft of full size, "" for nothing; arguments as in `make_plan`."""
    return _Planner(draft, structure, check, anew=False).full_size()[-1]


def make_plan(draft: Draft, structure: Structure, check: Check, anew: bool = True) -> Plan:
    """The furthest-reaching plan that holds; the draft is left as it says.

    Tried in turn: layers merged with their neighbours; merged, with the shapes kept in modules
    where a size is written out that no attribute patch fixes; with the shapes kept in all;
    each layer by itself. Where even that fails, the layers at fault stay full, and again from the
    start.

    Args:
        draft: of full size.
        structure: of its model.
        check: what comes of a draft.
        anew: modules may be made anew, with other sizes in their views.

    Raises:
        ValueError: not even the model of full size computes what the gated one does.
    """
    planner = _Planner(draft, structure, check, anew)
    while True:
        plan = planner.plan()
        if plan is not None:
            return plan
        planner.fix_what_fails()
