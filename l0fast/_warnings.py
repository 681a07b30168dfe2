"""Warnings that show the line of the caller's code, not a line of the library."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import torch

INSIDE = tuple(os.path.join(os.path.dirname(one), "") for one in (__file__, torch.__file__))
"""Folders whose frames are left out: this library, and PyTorch, which calls its hooks."""
PASSED = {contextlib.__file__}
"""Files that both go through."""


def warn(words: str) -> None:
    """Warns with the line that called into the library, or into PyTorch from outside.

    Equals, from Python 3.12 on:
        warnings.warn(words, skip_file_prefixes=INSIDE)
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_inside(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(words, stacklevel=level)


def _is_inside(path: str) -> bool:
    return path.startswith(INSIDE) or path in PASSED
