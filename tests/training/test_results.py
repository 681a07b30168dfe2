"""Rows of several seeds: means, deviations, and what a publication does not say."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from l0fast.training.results import aggregate, cells, deviation, head, markdown_table, text_table


def summary(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "penalty": None,
        "target_density": 0.33,
        "target_layer_density": None,
        "test_error_percent": 1.5,
        "best_test_error_percent": 1.4,
        "realised_density": 0.32,
        "params_fraction": 0.25,
        "macs_fraction": 0.26,
        "architecture": "200-100-10",
        "feasible": True,
        "seconds": 10.0,
        "settings": {"penalty_per_example": False},
    }
    return found | changes


def test_a_row_is_the_mean_of_its_seeds() -> None:
    errors = (1.5, 1.7, 1.3)
    summaries = [
        summary(
            test_error_percent=error,
            best_test_error_percent=error - 0.1 * i,
            architecture=f"{200 + i}-{100 - 3 * i}-10",
            feasible=i != 1,
            seconds=10.0 * i,
        )
        for i, error in enumerate(errors)
    ]
    row = aggregate("constrained", summaries)
    assert row["test_error_percent"] == pytest.approx(statistics.mean(errors))
    assert row["deviation"] == pytest.approx(statistics.stdev(errors))
    assert row["best_test_error_percent"] == pytest.approx(1.1)
    assert (row["architecture"], row["within"], row["seeds"]) == ("201-97-10", 2, 3)
    assert row["seconds"] == pytest.approx(10)
    words = dict(zip(head([]), cells(row), strict=True))
    assert words["test error %"] == "1.50 ± 0.20"
    assert words["within"] == "2 of 3"
    assert (words["density"], words["params"], words["MACs"]) == ("32.0 %", "25.0 %", "26.0 %")


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, "33 %"),
        ({"measure": "macs", "target_density": 0.465}, "46.5 % of macs"),
        ({"target_density": "10k params", "measure": "params"}, "10k params"),
        (
            {"target_density": None, "target_layer_density": {"fc1": 0.5, "fc2": "2k gates"}},
            "fc1=0.5 fc2=2k gates",
        ),
        ({"penalty": 0.1}, "lambda 0.1"),
        ({"penalty": 0.1, "settings": {"penalty_per_example": True}}, "lambda 0.1 / N"),
        ({"target_layer_density": {"a": 0.5, "b": 0.25}, "target_density": None}, "a=0.5 b=0.25"),
        ({"target_density": None, "architecture": None, "feasible": None}, ""),
    ],
)
def test_what_was_asked(changes: dict[str, Any], asked: str) -> None:
    assert aggregate("x", [summary(**changes)])["asked"] == asked


def test_one_seed_has_no_deviation_and_a_dense_run_no_target() -> None:
    assert deviation([1.0]) is None
    dense = summary(target_density=None, architecture=None, feasible=None, realised_density=None)
    words = dict(zip(head([]), cells(aggregate("dense", [dense])), strict=True))
    assert words["test error %"] == "1.50"
    assert (words["within"], words["density"], words["pruned to"]) == ("", "", "")


def test_tables_have_a_line_for_each_row() -> None:
    published = {"name": "poster", "best_test_error_percent": 1.4, "architecture": "198-233-100"}
    rows = [published, aggregate("ours", [summary()])]
    lines = markdown_table(rows).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(head([])) + 1}
    assert lines[2].startswith("| poster |  |  |  | 1.40 |")
    assert len(text_table(rows).splitlines()) == 3
