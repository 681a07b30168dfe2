"""The rows of the paper's table, and the trainings that reproduce each row."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from l0fast.commands.runs import Run, words

Row = dict[str, Any]

POSTER = "poster (2021)"
LATER = "authors' later runs (2022), 5 seeds"


class Case(NamedTuple):
    """A model and a method of the published table, and how they are trained."""

    name: str
    model: str
    what: str
    """The method; in the table by size, the size that is equal."""
    words: dict[str, str | bool]
    """Options of `l0fast train`."""
    published: tuple[Row, ...]
    recipes: tuple[str, ...] = ("published", "default")
    """Keys of `RECIPES`."""

    @property
    def title(self) -> str:
        """Model and method."""
        return f"{self.model}, {self.what}"


def _published(source: str, best: float, **values: Any) -> Row:
    """What a publication reports; "best" is the best test error of all seeds and epochs."""
    return {"name": source, "best_test_error_percent": best, **values}


PENALTY: dict[str, str | bool] = {"penalty": "0.1", "penalty_per_example": True}
AUGMENTED = ("published", "default", "augmented")
CASES = (
    Case(
        "mlp-penalised",
        "MLP 784-300-100",
        "penalised",
        {"model": "mlp", **PENALTY},
        (_published(POSTER, 1.4, asked="lambda 0.1 / N", architecture="219-214-100"),),
    ),
    Case(
        "mlp-constrained",
        "MLP 784-300-100",
        "constrained",
        {"model": "mlp", "density": "0.33"},
        (
            _published(POSTER, 1.4, asked="33 %", architecture="198-233-100"),
            _published(
                LATER,
                1.36,
                asked="33 %",
                test_error_percent=1.77,
                density=0.3417,
                params=0.266,
                macs=0.267,
            ),
        ),
        AUGMENTED,
    ),
    Case(
        "lenet5-penalised",
        "LeNet 20-50-800-500",
        "penalised",
        {"model": "lenet5", **PENALTY},
        (_published(POSTER, 0.9, asked="lambda 0.1 / N", architecture="20-25-45-462"),),
    ),
    Case(
        "lenet5-constrained",
        "LeNet 20-50-800-500",
        "constrained",
        {"model": "lenet5", "density": "0.1"},
        (
            _published(POSTER, 0.53, asked="10 %", architecture="20-21-34-407"),
            _published(
                LATER,
                0.56,
                asked="10 %",
                test_error_percent=1.01,
                density=0.1224,
                params=0.0775,
                macs=0.465,
            ),
        ),
        AUGMENTED,
    ),
)
"""The errors of the later runs are means of the last epoch."""


def _later(case: int) -> tuple[Row, ...]:
    return CASES[case].published[1:]


SIZES = (
    Case(
        "mlp-params",
        "MLP 784-300-100",
        "as many parameters",
        {"model": "mlp", "density": "0.266", "measure": "params"},
        _later(1),
        ("default",),
    ),
    Case(
        "lenet5-params",
        "LeNet 20-50-800-500",
        "as many parameters",
        {"model": "lenet5", "density": "0.0775", "measure": "params"},
        _later(3),
        ("default",),
    ),
    Case(
        "lenet5-macs",
        "LeNet 20-50-800-500",
        "as many MACs",
        {"model": "lenet5", "density": "0.465", "measure": "macs"},
        _later(3),
        ("default",),
    ),
    Case(
        "lenet5-few-macs",
        "LeNet 20-50-800-500",
        "a third of the MACs",
        {"model": "lenet5", "density": "0.155", "measure": "macs"},
        tuple(row | {"name": f"{row['name']}, with three times as many"} for row in _later(3)),
        ("default",),
    ),
)
"""The published density counts the parameters that gates control, not those a pruned model has.
These cases compare at equal sizes, and ask how small a model reaches the published error."""


class Recipe(NamedTuple):
    """How the runs of a row are trained."""

    title: str
    words: dict[str, str]


RECIPES = {
    "published": Recipe("published settings", {"recipe": "published"}),
    "default": Recipe("this project's recipe", {}),
    "augmented": Recipe("this project's recipe, images shifted", {"augment": "crop"}),
}


def row_name(case: Case, recipe: str) -> str:
    """The name of a row of runs; the names of their folders begin with it."""
    return f"{case.name}-{recipe}"


def plan(seeds: Sequence[int], shared: Mapping[str, Any]) -> list[Run]:
    """Every training of both tables; `shared` are options that all of them have."""
    runs: list[Run] = []
    for case in (*CASES, *SIZES):
        for recipe in case.recipes:
            asked = dict(shared) | case.words | RECIPES[recipe].words
            for seed in seeds:
                args: argparse.Namespace = words(**asked, seed=seed)
                runs.append(Run(row_name(case, recipe), args))
    return runs
