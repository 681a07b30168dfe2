"""What torch.export is kept from: it speaks of its own affairs, and refuses checks of values."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager, redirect_stderr
from io import StringIO

from torch.distributions import Distribution


@contextmanager
def quietly() -> Generator[None]:
    """torch.export speaks of its own affairs, on stderr too: not while we use it."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def without_validation() -> Generator[None]:
    """Distributions look at the values that they are given, which torch.export does not know."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)
