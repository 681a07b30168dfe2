"""The process that measures: takes case names on standard input, answers line by line in JSON.

A fault on a GPU poisons the process it happens in, so measuring has one of its own: it ends at such
a fault, and `bench.run` starts another for the cases that are left.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch

from bench import cuda, registry
from bench.report import failure
from bench.timing import FULL, FULL_GPU, QUICK, one_line

POISONED = 3
"""Exit code after a fault that the GPU does not recover from."""


def _usable(device: str) -> bool:
    if device != "cuda" or not cuda.available():
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return False
    return True


def main() -> int:
    """Measures the cases of {"cases": [names], "quick": bool, "threads": int}."""
    asked: dict[str, Any] = json.load(sys.stdin)
    # Prints of libraries must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    torch.set_num_threads(int(asked["threads"]))
    cases = {case.name: case for case in registry.cases(bool(asked["quick"]))}
    for name in asked["cases"]:
        case = cases[name]
        effort = QUICK if asked["quick"] else FULL_GPU if case.device == "cuda" else FULL
        say(start=name)
        try:
            if case.device == "cuda" and not cuda.available():
                raise RuntimeError("no CUDA device")
            rows = case.run(effort)
        except Exception as error:
            # For example out of memory: the next case needs what this one frees.
            rows = [failure(name, "all", case.device, one_line(error))]
        usable = _usable(case.device)
        say(rows=[asdict(row) for row in rows], done=name)
        if not usable:
            return POISONED
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
