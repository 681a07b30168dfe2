"""How a command ends: with an exit code, and with one line on stderr if it fails."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator
from typing import Any, NoReturn, TextIO

from l0fast import _checks

BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
TRACEBACK_VARIABLE = "L0FAST_TRACEBACK"
"""If this environment variable is set, an error shows its traceback."""


NO_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")
"""Words of PyTorch's errors when memory runs out."""


class Terminated(BaseException):
    """SIGTERM: the process is asked to end."""


def print_all_letters() -> None:
    """Lets letters that the terminal's encoding lacks be printed as escapes, without an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


class Parser(argparse.ArgumentParser):
    """A parser that reports a bad option in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with code 2."""
        self.exit(BAD_INPUT, f"{_checks.printable(f'{self.prog}: {message}')}\n")


class _Printable(io.TextIOBase):
    """A stream that prints control characters as escapes, so that a terminal does not obey them."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes the text; line breaks and tabs stay."""
        self._stream.write(_checks.printable(text, keep="\n\t"))
        return len(text)

    def flush(self) -> None:
        """Of the stream behind."""
        self._stream.flush()

    def isatty(self) -> bool:
        """Of the stream behind."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Of the stream behind."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream behind."""
        return self._stream.encoding


@contextlib.contextmanager
def _printing() -> Generator[None]:
    """Within it, nothing that is printed holds control characters."""
    if sys.stdout is None:  # the shell has closed it: nothing is printed
        yield
        return
    out: Any = _Printable(sys.stdout)
    with contextlib.redirect_stdout(out):
        yield


@contextlib.contextmanager
def _short_warnings(name: str) -> Generator[None]:
    """Warnings are shown in one line each, without the code that gives them."""
    before = warnings.formatwarning

    def in_one_line(message: Warning | str, *_: Any) -> str:
        return _checks.printable(f"{name}: warning: {' '.join(str(message).split())}") + "\n"

    warnings.formatwarning = in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


def _terminate(*_: object) -> NoReturn:
    if hasattr(signal, "SIGCHLD"):
        # The workers of a DataLoader may have got the signal, too. PyTorch would raise an error of
        # their end while this process ends.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raise Terminated


@contextlib.contextmanager
def _raising_signals() -> Generator[None]:
    """SIGTERM and Ctrl-C raise within it: what is half written goes, what is done stays."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is told of signals
        return
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate}
    before = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        if before[number] != signal.SIG_IGN:  # the shell ignores it for this process
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def answer(work: Callable[[], int], name: str, goes_on: str | None) -> int:
    """Runs a command; whatever stops it becomes one line on stderr.

    Args:
        work: the command; returns its exit code.
        name: what the line of an error begins with.
        goes_on: how to continue an interrupted command, in words; None if that is not possible.

    Returns:
        The exit code: that of `work`, 2 for bad input or an error, 130 for Ctrl-C, 143 for SIGTERM.
    """
    try:
        with _printing(), _short_warnings(name), _raising_signals():
            return work()
    except KeyboardInterrupt:
        return _stopped(name, "interrupted", goes_on, INTERRUPTED)
    except Terminated:
        return _stopped(name, "terminated", goes_on, TERMINATED)
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(_checks.printable(f"{name}: {_in_words(error)}"), file=sys.stderr)
        return BAD_INPUT


def _stopped(name: str, how: str, goes_on: str | None, code: int) -> int:
    print(f"{name}: {how}" + (f"; {goes_on}" if goes_on else ""), file=sys.stderr)
    return code


def _in_words(error: Exception) -> str:
    """One line for an error: its message, with the class in front if it is not a usual one."""
    words = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError):
        return words
    if isinstance(error, MemoryError) or any(one in words for one in NO_MEMORY):
        return f"memory: there is not enough ({words or type(error).__name__})"
    if isinstance(error, (ValueError, TypeError, OSError)):
        return words
    kind = type(error).__name__
    return f"{kind}: {words} ({TRACEBACK_VARIABLE}=1 shows where)"
