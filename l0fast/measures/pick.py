"""The measure that a target names."""

from __future__ import annotations

from collections.abc import Mapping

from l0fast.layers.gated import Gated
from l0fast.measures.footprint import Footprint
from l0fast.measures.groups import Group
from l0fast.measures.latency import LatencyTable
from l0fast.measures.measure import GateMeasure, Measure, OwnMeasure
from l0fast.measures.timed import Latency
from l0fast.measures.trial import Trial


def measure_of(layers: Mapping[str, Gated], groups: list[Group], tried: Trial | None) -> Measure:
    """The measure that all of `groups` name; `tried` for those of the pruned model."""
    measure = groups[0].measure
    if callable(measure):
        return OwnMeasure(layers, groups[0])
    if measure == "gates":
        return GateMeasure(layers, groups)
    assert tried is not None
    kind = Latency if isinstance(measure, LatencyTable) else Footprint
    return kind(layers, tried, groups)
