"""Tables of results: each row is one training, with means over its seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from l0fast._metrics import ERROR, PERCENT, held_key, metric_of, title
from l0fast._tables import aligned

Row = dict[str, Any]

SHARES = ("params_fraction", "macs_fraction")
ASKED = ("penalty", "target_density", "target_layer_density")


def is_summary(summary: object) -> bool:
    """Whether an object read from a file has all that a row of a table needs."""
    if not isinstance(summary, dict):
        return False
    get = summary.get
    held = held_key(str(metric_of(summary)))
    numbers: list[Any] = [get(name) for name in (held, f"best_{held}", *SHARES, "seconds")]
    numbers += [get(n) for n in ("penalty", "realised_density") if get(n) is not None]
    targets = get("target_layer_density") or {}
    widths = get("architecture")
    settings = get("settings")
    return (
        all(name in summary for name in (*ASKED, "feasible", "architecture"))
        and all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
        and (widths is None or re.fullmatch(r"\d+(-\d+)*", str(widths)) is not None)
        and type(get("feasible")) in (bool, type(None))
        and isinstance(targets, dict)
        and all(type(one) in (int, float, str) for one in targets.values())
        and type(get("target_density")) in (int, float, str, type(None))
        and isinstance(settings, dict)
        and type(settings.get("penalty_per_example")) is bool
    )


def mean(values: Sequence[float]) -> float:
    """The mean of one value or more."""
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation of the sample (over N - 1); None for a single value."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def aggregate(name: str, summaries: Sequence[Mapping[str, Any]]) -> Row:
    """The row of one training.

    Args:
        name: of the row.
        summaries: of its finished runs, one for each seed, as summary.json has them.

    Returns:
        name, asked, seeds; metric (its name), test_METRIC and deviation (of the pruned models),
        best_test_METRIC (the lowest of all seeds and epochs); density, params, macs (mean
        fractions that the pruned models have), architecture (mean widths), within (how many meet
        their target; None without one), seconds (mean).
    """
    metric = metric_of(summaries[0])
    held = held_key(metric)
    errors = [summary[held] for summary in summaries]
    feasible = [s["feasible"] for s in summaries if s["feasible"] is not None]
    widths = [s["architecture"].split("-") for s in summaries if s["architecture"]]
    densities = [s["realised_density"] for s in summaries if s.get("realised_density") is not None]
    return {
        "name": name,
        "asked": _asked(summaries[0]),
        "seeds": len(summaries),
        "metric": metric,
        held: mean(errors),
        "deviation": deviation(errors),
        f"best_{held}": min(s[f"best_{held}"] for s in summaries),
        "density": mean(densities) if densities else None,
        "params": mean([s["params_fraction"] for s in summaries]),
        "macs": mean([s["macs_fraction"] for s in summaries]),
        "architecture": "-".join(
            str(round(mean([int(w) for w in column]))) for column in zip(*widths, strict=True)
        ),
        "within": sum(feasible) if feasible else None,
        "seconds": mean([s["seconds"] for s in summaries]),
    }


def _asked(summary: Mapping[str, Any]) -> str:
    """The target of a run, in words."""
    if summary["penalty"] is not None:
        unit = " / N" if summary["settings"]["penalty_per_example"] else ""
        return f"lambda {summary['penalty']:g}{unit}"
    if summary["target_layer_density"] is not None:
        return " ".join(
            f"{name}={target if isinstance(target, str) else f'{target:g}'}"
            for name, target in summary["target_layer_density"].items()
        )
    if summary["target_density"] is None:
        return ""
    if isinstance(summary["target_density"], str):  # an amount, with its unit
        return summary["target_density"]
    measure = summary.get("measure", "gates")
    of = "" if measure == "gates" else f" of {measure}"
    return f"{100 * summary['target_density']:.4g} %{of}"


def head(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names of the columns of a table of these rows."""
    metric = metric_of(rows[0]) if rows else ERROR
    percent = metric.endswith(PERCENT)
    return (
        "run",
        "asked",
        "seeds",
        f"test {title(metric)}".replace("(%)", "%"),
        "best %" if percent else "best",
        "density",
        "params",
        "MACs",
        "pruned to",
        "within",
        "seconds",
    )


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a row, in the order of `head`; a cell without a value is empty."""
    metric = metric_of(row)
    held = held_key(metric)
    form = "{:.2f}" if metric.endswith(PERCENT) else "{:.4g}"

    def share(name: str) -> str:
        return "" if row.get(name) is None else f"{100 * row[name]:.1f} %"

    def number(name: str, form: str) -> str:
        return "" if row.get(name) is None else form.format(row[name])

    error = number(held, form)
    if row.get("deviation") is not None:
        error += f" ± {form.format(row['deviation'])}"
    within = "" if row.get("within") is None else f"{row['within']} of {row['seeds']}"
    return (
        str(row["name"]),
        row.get("asked", ""),
        str(row.get("seeds", "")),
        error,
        number(f"best_{held}", form),
        share("density"),
        share("params"),
        share("macs"),
        row.get("architecture", ""),
        within,
        number("seconds", "{:.0f}"),
    )


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, aligned."""
    return "\n".join(aligned([head(rows), *map(cells, rows)], left=2))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    names = head(rows)
    lines = [names, tuple("---" for _ in names), *map(cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
