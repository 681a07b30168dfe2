"""Every case there is, by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from bench import (
    bench_compaction,
    bench_ffn,
    bench_gated_weight,
    bench_hard_concrete,
    bench_latency,
    bench_prune,
    bench_scaled_weight,
    bench_skip,
    bench_skipping_linear,
    bench_step,
)
from bench.case import Case

MODULES = {
    "hard_concrete": bench_hard_concrete,
    "gated_weight": bench_gated_weight,
    "scaled_weight": bench_scaled_weight,
    "compaction": bench_compaction,
    "step": bench_step,
    "skip": bench_skip,
    "skipping_linear": bench_skipping_linear,
    "ffn": bench_ffn,
    "prune": bench_prune,
    "latency": bench_latency,
}


FIRST = (
    ("skipping_linear/cuda/ffn/density-0.[135]",),
    ("ffn/cuda/*",),
    ("gated_weight/cuda/*/2^26",),
    ("hard_concrete/cuda/*",),
    ("step/cuda/mlp", "skipping_linear/cuda/mlp/*"),
)
LAST = (
    ("gated_weight/cuda/*/2^2[024]",),
    ("step/cuda/vit-b16",),
    ("step/cuda/*/density-0.3",),
    ("gated_weight/cuda/*/2^28",),
)
"""Names of cases: a time that runs out takes the last of these, and leaves the first of those."""


def cases(quick: bool) -> list[Case]:
    """All cases, the most important first; with `quick`, fewer sizes."""
    found = [case for module in MODULES.values() for case in module.cases(quick)]
    return sorted(found, key=lambda case: _rank(case.name))


def _rank(name: str) -> int:
    for rank, patterns in enumerate((*FIRST, ("*",), *LAST)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns if pattern != "*"):
            return rank
    return len(FIRST)


def stem(case: str) -> str:
    """The first part of a case's name: what it measures."""
    return case.partition("/")[0]


def select(found: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases with one of these names, or under it ("step", "step/cpu"); all without a name.

    Raises:
        ValueError: a name that fits none.
    """
    for name in names:
        if not any(_fits(case, name) for case in found):
            expected = f"{', '.join(MODULES)}, or a case's name"
            raise ValueError(f"names: got {name!r}; expected {expected}")
    return [case for case in found if not names or any(_fits(case, name) for name in names)]


def _fits(case: Case, name: str) -> bool:
    return case.name == name or case.name.startswith(name.rstrip("/") + "/")
