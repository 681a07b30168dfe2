"""Where a kernel's tests run: on the GPU if there is one, else in Triton's interpreter.

Triton decides at its import whether kernels are compiled or interpreted, so the interpreter needs
a process of its own. Without a GPU a ``kernel_test`` therefore runs its whole file once more, in a
child with TRITON_INTERPRET=1, and reports there what it would have reported here.
"""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = INTERPRETED or DEVICE == "cuda"

TestFunction = Callable[..., None]


def kernel_test(test: TestFunction) -> TestFunction:
    """Marks a test that launches kernels: runs it here if they run here, else in the child."""

    @functools.wraps(test)
    def run(request: pytest.FixtureRequest, **arguments: object) -> None:
        if RUNS_HERE:
            test(**arguments)
            return
        file = Path(inspect.getfile(test))
        outcome = outcomes(file).get(request.node.name)
        if outcome is None:
            pytest.fail(f"{file.name} in the interpreter: {request.node.name} was not run")
        kind, text = outcome
        if kind == "skipped":
            pytest.skip(text)
        if kind != "passed":
            pytest.fail(f"in the interpreter:\n{text}", pytrace=False)

    signature = inspect.signature(test)
    request = inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = [request, *signature.parameters.values()]
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    return run


@functools.cache
def outcomes(file: Path) -> dict[str, tuple[str, str]]:
    """What each test of a file did in the interpreter: (passed, skipped or failed, and why)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            + [f"--junitxml={report}", str(file)],
            cwd=file.parent.parent,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if not report.is_file():
            raise RuntimeError(f"pytest wrote no report:\n{done.stdout}{done.stderr}")
        root = ElementTree.parse(report).getroot()
    found: dict[str, tuple[str, str]] = {}
    for case in root.iter("testcase"):
        kind, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                kind, text = child.tag, child.text or child.get("message", "")
        found[case.get("name", "")] = (kind, text)
    return found
