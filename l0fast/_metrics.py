"""What the metric of a run is called, in its files and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ERROR = "error_percent"
"""The metric of a classifier: the share of examples that it gets wrong."""
PERCENT = "_percent"
"""What the name of a metric in percent ends with."""


def metric_of(summary: Mapping[str, Any]) -> str:
    """The metric of a run, by its summary or a row of a table; earlier versions had one only."""
    return summary.get("metric", ERROR)


def held_key(metric: str) -> str:
    """Under which a row of metrics, and a summary, has it for the test examples."""
    return f"test_{metric}"


def validation_key(metric: str) -> str:
    """The same for the examples held out."""
    return f"validation_{metric}"


def train_key(metric: str) -> str:
    """The same for the training examples, with the gates as they were drawn."""
    return f"train_{metric}"


def title(metric: str) -> str:
    """For an axis or a column: `error (%)`, `loss`."""
    name = metric.removesuffix(PERCENT).replace("_", " ")
    return f"{name} (%)" if metric.endswith(PERCENT) else name


def in_words(metric: str, value: float) -> str:
    """A value with its name: `error 1.25 %`, `loss 0.01234`."""
    return f"{title(metric).removesuffix(' (%)')} {number(metric, value)}"


def number(metric: str, value: float) -> str:
    """A value with its unit: `1.25 %`, `0.01234`."""
    return f"{value:.2f} %" if metric.endswith(PERCENT) else f"{value:.4g}"
