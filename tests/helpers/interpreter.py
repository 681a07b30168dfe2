"""Where a kernel's tests run: on the GPU if there is one, else in Triton's interpreter.

Triton decides at its import whether kernels are compiled or interpreted, so the interpreter needs
a process of its own. Without a GPU all ``kernel_test``s therefore run together in a child with
TRITON_INTERPRET=1, and each reports here how it fared there.
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
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from tests import ROOT
from tests.helpers.once import once_a_run

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUNS_HERE = INTERPRETED or DEVICE == "cuda"

if INTERPRETED:
    # Triton 3.6's interpreter takes a bound that a kernel has loaded for a number by a conversion
    # that numpy has since given up; later ones do as here.
    from triton.runtime import interpreter as _triton

    _patch_tensor = _triton._patch_lang_tensor

    def _patched(tensor: Any, scope: Any) -> None:
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    _triton._patch_lang_tensor = _patched

TestFunction = Callable[..., None]

_kernel_tests: dict[Path, list[str]] = {}


def kernel_test(test: TestFunction) -> TestFunction:
    """Marks a test that launches kernels: runs it here if they run here, else in the child."""
    file = Path(inspect.getfile(test))
    _kernel_tests.setdefault(file, []).append(test.__name__)

    @functools.wraps(test)
    def run(request: pytest.FixtureRequest, **arguments: object) -> None:
        if RUNS_HERE:
            test(**arguments)
            return
        found = outcomes(request.config.option.markexpr)
        try:
            kind, text = found[f"{file.stem}::{request.node.name}"]
        except KeyError:
            said = found.get(f"{file.stem}::", ["", f"{request.node.name} was not run"])[1]
            pytest.fail(f"{file.name} in the interpreter: {said}")
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
def outcomes(marks: str) -> dict[str, list[str]]:
    """What each kernel test did in the interpreter: [kind, text], by its file and name; of those
    that pytest's option -m selects."""
    return once_a_run("interpreter", lambda: _run(sorted(_kernel_tests), marks))


def _run(files: list[Path], marks: str) -> dict[str, list[str]]:
    """Runs the kernel tests of some files; if they take their process along, file by file."""
    names = [name for file in files for name in _kernel_tests[file]]
    command = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marks)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", "-k", " or ".join(names), *files],
                cwd=ROOT,
                env={**os.environ, "TRITON_INTERPRET": "1"},
                capture_output=True,
                text=True,
                check=False,
                timeout=300 * len(files),
            )
            said = f"exit code {done.returncode} and no report:\n{done.stdout}{done.stderr}"
        except subprocess.TimeoutExpired:
            said = "it did not return"
        cases = (
            list(ElementTree.parse(report).getroot().iter("testcase")) if report.is_file() else []
        )
    found: dict[str, list[str]] = {}
    for case in cases:
        kind, text = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                kind, text = child.tag, child.text or child.get("message", "")
        module = case.get("classname", "").rpartition(".")[2]
        found[f"{module}::{case.get('name', '')}"] = [kind, text]
    if cases:
        return found
    # A kernel that writes out of bounds may take its process along.
    if len(files) > 1:
        return dict(pair for file in files for pair in _run([file], marks).items())
    return {f"{files[0].stem}::": ["failed", said]}
