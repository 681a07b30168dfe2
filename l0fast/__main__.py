"""The command, `l0fast` or `python -m l0fast`. It answers signals before it loads PyTorch."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def _end_at_once_on(number: int, word: str) -> None:
    """Lets a signal end the process in one line: outside the work of a command there is nothing to
    undo. (`commands.shell.answer` handles signals within it.) A signal that the shell ignores for
    this process stays ignored.
    """

    def end(*_: object) -> NoReturn:
        os.write(2, f"l0fast: {word}\n".encode())
        os._exit(128 + number)

    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, end)


def main() -> int:
    """Runs the command with the arguments of this process; its exit code is that of `cli.main`."""
    _end_at_once_on(signal.SIGINT, "interrupted")
    _end_at_once_on(signal.SIGTERM, "terminated")
    from l0fast.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
