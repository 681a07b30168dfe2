"""A case: variants of the same work, timed side by side, and what is asked of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from bench import counting
from bench.report import Row, failure
from bench.timing import (
    Call,
    Effort,
    Quartiles,
    cpu_sample,
    cuda_sample,
    interleaved,
    one_line,
    paired_ratios,
    quartiles,
)


@dataclass(frozen=True)
class Variant:
    """One way to do a case's work."""

    name: str
    build: Callable[[], Call]
    calls: int = 1
    """How many times one run of the built call does the work."""
    graphed: bool = False
    compiled: bool = False
    note: str = ""


@dataclass(frozen=True)
class Goal:
    """A limit for a variant: of its time over the baseline's, or of one of its counts."""

    variant: str
    at_most: float
    text: str
    baseline: str | None = None
    count: str | None = None
    """"ops", "items" or "launches"."""

    def reached(self, ratio: float | None, counts: dict[str, int]) -> bool | None:
        """Whether the goal is reached; None if it was not measured."""
        value = ratio if self.count is None else counts.get(self.count)
        return None if value is None else value <= self.at_most


@dataclass(frozen=True)
class Case:
    """A case: one line of `--list`."""

    name: str
    device: str
    run: Callable[[Effort], list[Row]]


def _side_stream(device: str) -> AbstractContextManager[object]:
    """The stream on which a whole case runs, as a graph must be captured on its inputs' stream."""
    if device != "cuda":
        return nullcontext()
    torch.cuda.synchronize()  # inputs were made on the stream before
    return torch.cuda.stream(torch.cuda.Stream())


def measure(
    case: str,
    device: str,
    variants: Sequence[Variant],
    effort: Effort,
    *,
    baseline: str,
    goals: Sequence[Goal] = (),
    bytes_moved: int | None = None,
    count_ops: bool = False,
    count_launches: bool = False,
) -> list[Row]:
    """Builds, times and counts the variants; one that fails is a row that says so.

    Args:
        case: its name.
        device: "cpu" or "cuda".
        variants: in the order of the rows.
        effort: rounds and lengths.
        baseline: the variant that ratios are of, where no goal names another.
        goals: each makes a row of its variant.
        bytes_moved: the least the work moves through memory; gives the rate of each variant.
        count_ops: also the dispatched ops and `.item()`s.
        count_launches: also the kernels (on a GPU).
    """
    failures: dict[str, str] = {}
    calls: dict[str, Call] = {}
    with _side_stream(device):
        for variant in variants:
            try:
                calls[variant.name] = variant.build()
            except Exception as error:
                failures[variant.name] = one_line(error)
                _free(device)  # free its memory for the next variant
        sample = cuda_sample if device == "cuda" else cpu_sample
        samples, late = interleaved(calls, sample, effort)
        failures |= late
        rows: list[Row] = []
        for variant in variants:
            name = variant.name
            if name in failures:
                rows.append(failure(case, name, device, failures[name].strip()))
                continue
            samples[name] = [value / variant.calls for value in samples[name]]
        for variant in variants:
            if variant.name in samples:
                extra = _counts(variant, calls[variant.name], device, count_ops, count_launches)
                rows += _rows(case, device, variant, samples, baseline, goals, bytes_moved, extra)
    del calls
    _free(device)
    order = [variant.name for variant in variants]
    return sorted(rows, key=lambda row: order.index(row.variant))


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@dataclass
class _Extra:
    counts: dict[str, int]
    peak_mib: float | None = None
    notes: tuple[str, ...] = ()


def _counts(variant: Variant, call: Call, device: str, ops: bool, launches: bool) -> _Extra:
    """The counts of a variant; a count that fails becomes a note, and the times stay."""
    extra = _Extra({}, notes=(variant.note,) if variant.note else ())
    if ops and not variant.graphed and not variant.compiled:
        extra.counts["ops"], extra.counts["items"] = counting.dispatched(call)
    if device == "cuda" and not variant.graphed:
        extra.peak_mib = counting.peak_mib(call)
    if launches and device == "cuda":
        try:
            names = counting.kernels(call)
        except Exception as error:
            extra.notes += (f"kernels not counted ({one_line(error)})",)
        else:
            extra.counts["launches"] = len(names)
            if len(names) <= 4:
                extra.notes += (", ".join(name[:40] for name in names),)
    return extra


def _rows(
    case: str,
    device: str,
    variant: Variant,
    samples: dict[str, list[float]],
    baseline: str,
    goals: Sequence[Goal],
    bytes_moved: int | None,
    extra: _Extra,
) -> list[Row]:
    """One row for each goal of a measured variant, and one without where none is about time.

    A goal about a count stands alone, without a ratio.
    """
    own = samples[variant.name]
    time = quartiles(own)
    mine: list[Goal | None] = [goal for goal in goals if goal.variant == variant.name]
    if all(goal is not None and goal.count is not None for goal in mine):
        mine.insert(0, None)
    rows: list[Row] = []
    for goal in mine:
        against = baseline if goal is None or goal.baseline is None else goal.baseline
        ratio: Quartiles | None = None
        counted = goal is not None and goal.count is not None
        if not counted and against != variant.name and against in samples:
            ratio = paired_ratios(own, samples[against])
        middle = None if ratio is None else ratio.p50
        rows.append(
            Row(
                case,
                variant.name,
                device,
                p25_ms=time.p25,
                p50_ms=time.p50,
                p75_ms=time.p75,
                baseline=against if ratio is not None else None,
                ratio_p25=None if ratio is None else ratio.p25,
                ratio_p50=middle,
                ratio_p75=None if ratio is None else ratio.p75,
                goal="" if goal is None else goal.text,
                reached=None if goal is None else goal.reached(middle, extra.counts),
                ops=extra.counts.get("ops"),
                items=extra.counts.get("items"),
                launches=extra.counts.get("launches"),
                gb_per_s=None if bytes_moved is None else bytes_moved / time.p50 / 1e6,
                peak_mib=extra.peak_mib,
                note="; ".join(extra.notes),
            )
        )
    return rows
