"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO, NoReturn

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing is locked there
    fcntl = None

PARTS = ".*.part"
"""Pattern of the temporary files, which only a killed process leaves behind."""
PATIENCE = 60.0
"""How many seconds `locked` waits at most."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, then puts the file in its place.

    A reader sees the old file or the new one, never a part; after a crash, the old one. What
    earlier processes that died left of this file is removed. The file has the mode of a new file,
    by the process's umask, however `write` makes it.
    """
    sweep(path.parent, f".{glob.escape(path.name)}.*.part")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # "disk full": where?
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def part_folder(path: Path) -> Generator[Path]:
    """A temporary folder beside `path`, for writers that leave temporary files of their own where
    they write; swept like a temporary file."""
    folder = path.with_name(f".{path.name}.folder.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def sweep(folder: Path, pattern: str = PARTS) -> None:
    """Removes temporary files of `write_atomically` whose process is dead."""
    for part in folder.glob(pattern):
        pid = part.suffixes[-2][1:] if len(part.suffixes) > 1 else ""
        if pid.isdecimal() and not _is_alive(int(pid)):
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading: what is none (a FIFO, a device) could block forever.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_text(path: Path) -> str:
    """The UTF-8 text of a regular file.

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is not UTF-8.
    """
    with open_regular(path) as file:
        return file.read().decode("utf-8")


def why_unwritable(folder: Path) -> str | None:
    """Why no file can be written into a folder, there or still to be made; None if one can. It is
    tried, by a file that never gets a name, or loses it at once."""
    nearest = folder
    try:
        while not os.path.lexists(nearest) and nearest != nearest.parent:
            nearest = nearest.parent
        with tempfile.TemporaryFile(dir=nearest):
            return None
    except OSError as error:
        return f"{nearest}: {error.strerror}"


class FolderLock:
    """An exclusive lock on a folder, between processes and between objects of one process.

    It is the operating system's (flock), so it ends with its process. Where the file system has
    no locks, nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            BlockingIOError: another one has it.
        """
        if fcntl is None or self._descriptor is not None:
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # no locks here
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def release(self) -> None:
        """Gives it back, if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.release()


@contextlib.contextmanager
def locked(folder: Path, patience: float = PATIENCE) -> Generator[None]:
    """Holds the lock of a folder; waits for it for at most `patience` seconds.

    Raises:
        BlockingIOError: another process still has it.
    """
    lock, end = FolderLock(folder), time.monotonic() + patience
    while True:
        try:
            lock.acquire()
            break
        except BlockingIOError:
            if time.monotonic() >= end:
                _still_locked(folder)
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _still_locked(folder: Path) -> NoReturn:
    raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing here", str(folder))
