"""How a command answers the shell: an exit code, and one line on stderr when it did not succeed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that reports a bad option in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def answer(work: Callable[[], int], name: str, interrupted: str) -> int:
    """Runs a command and turns what stops it into one line on stderr.

    Args:
        work: the command; returns its exit code.
        name: what the line of an error begins with.
        interrupted: the line after Ctrl-C.

    Returns:
        The exit code: that of `work`, 2 for bad input, 130 for Ctrl-C.
    """
    try:
        return work()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
