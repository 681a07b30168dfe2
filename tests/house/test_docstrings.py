"""The examples in the docstrings of the public names run as they stand there."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import l0fast

NAMES = (
    "DensityConstraint",
    "Constraints",
    "HardConcrete",
    "L0Linear",
    "L0Penalty",
    "density",
    "functional.hard_concrete",
    "gates",
    "load_pruned",
    "measure_latency",
    "param_groups",
    "prune",
    "prune_optimizer",
    "save_pruned",
    "sparsify_",
)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples(name: str, documented: Any) -> list[doctest.DocTest]:
    """The examples in the docstring of one public name; its methods' are not among them."""
    names = {"torch": torch, "nn": nn, "l0fast": l0fast}
    finder = doctest.DocTestFinder(recurse=False)
    return [one for one in finder.find(documented, name, globs=names) if one.examples]


def failures(test: doctest.DocTest) -> str:
    """What the examples print that their docstring does not say."""
    words: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=words.append)
    return "".join(words)


@pytest.mark.parametrize("name", NAMES)
def test_its_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    documented: Any = l0fast
    for part in name.split("."):
        documented = getattr(documented, part)
    (test,) = examples(name, documented)
    assert failures(test) == ""


def test_an_example_that_is_wrong_is_seen() -> None:
    def wrong() -> None:
        """
        >>> 1 + 1
        3
        """

    (test,) = examples("wrong", wrong)
    assert "Expected:\n    3\nGot:\n    2" in failures(test)


def test_no_example_is_left_out() -> None:
    public = [(name, getattr(l0fast, name)) for name in l0fast.__all__]
    public += [
        (f"functional.{name}", value)
        for name, value in vars(l0fast.functional).items()
        if inspect.isfunction(value) and value.__module__ == "l0fast.functional"
    ]
    found = {
        name for name, value in public if callable(value) and ">>>" in (inspect.getdoc(value) or "")
    }
    assert found == set(NAMES)
