"""What a target is about: some gated layers or a whole module, and the measure it is a share of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor

from l0fast import _checks
from l0fast.layers.gated import Gated
from l0fast.measures.amounts import Asked, check
from l0fast.measures.latency import LatencyTable

WHOLE_MODEL = "model"
"""The name of the one group that holds every gated layer."""

Cost = Callable[[Mapping[str, Tensor]], Tensor]
"""A cost of the user's own: open probabilities of each layer's gates, by name -> 0-d."""


AnyMeasure = str | Cost | LatencyTable
"""The name of a measure, a cost of the user's own, or a table of seconds."""


def measure_name(measure: AnyMeasure) -> str:
    """What reports and messages call a measure."""
    if isinstance(measure, LatencyTable):
        return "latency"
    return measure if isinstance(measure, str) else getattr(measure, "__name__", "cost")


class Group(NamedTuple):
    """What one target is about."""

    layers: tuple[str, ...]
    """The gated layers."""
    measure: AnyMeasure = "gates"
    whole: str | None = None
    """The module that is measured as a whole, with all in it that has no gates ("" is the model);
    None: the layers alone."""


class Asking:
    """A constraint, a penalty or several of them: it may say what densities a model shall have."""

    @property
    def layers(self) -> Mapping[str, Gated]:
        """Name -> gated layer of the model."""
        raise NotImplementedError

    def asked(self) -> dict[str, tuple[Group, Asked]]:
        """Name of each target -> what it is about, and the target."""
        return {}

    def parts(self) -> list[Asking]:
        """The single constraints that this one is made of, perhaps itself alone."""
        return [self]


def target_groups(
    layers: Mapping[str, Gated],
    target: Asked | Mapping[str, Asked],
    measure: AnyMeasure = "gates",
) -> dict[str, tuple[Group, Asked]]:
    """Group name -> (group, target as asked): one group for a number, or one for each key.

    A key is a layer's name or a glob pattern. Refused: an unknown key, a layer in two groups, a
    number that is no density, an amount of something else.
    """
    by = measure_name(measure)
    if not isinstance(target, Mapping):
        whole = None if measure == "gates" else ""
        group = Group(tuple(layers), measure, whole)
        return {WHOLE_MODEL: (group, check("target", target, by))}
    if callable(measure):
        _checks.refuse("target", target, "one number, for a cost of your own", TypeError)
    if not target:
        _checks.refuse("target", target, "at least one layer or pattern")
    groups: dict[str, tuple[Group, Asked]] = {}
    owner: dict[str, str] = {}
    for key, value in target.items():
        if not isinstance(key, str):
            _checks.refuse("target", key, "layer names or patterns as keys", TypeError)
        matched = tuple(name for name in layers if fnmatchcase(name, key))
        if not matched:
            _checks.refuse("target", key, f"a pattern that matches one of {list(layers)}")
        for name in matched:
            if name in owner:
                _checks.refuse(
                    "target", key, f"layers of one group only ({name!r} is in {owner[name]!r})"
                )
            owner[name] = key
        groups[key] = Group(matched, measure), check(f"target[{key!r}]", value, by)
    return groups


def gated_parameters(layers: list[Gated]) -> int:
    """How many parameters the gates of `layers` control."""
    return sum(layer.all_gates * layer.group_size for layer in layers)
