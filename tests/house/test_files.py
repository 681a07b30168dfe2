"""A file is whole or not there, whatever stops the process that writes it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from l0fast._files import PARTS, why_unwritable, write_atomically, write_text
from tests import ROOT


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    for text in ("one\n", "zwei ü\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "x.txt"
    if there:
        path.write_text("old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent  # os.replace is atomic within a file system only
        temporary.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_atomically(path, write)
    assert os.listdir(tmp_path) == (["x.txt"] if there else [])
    assert not there or path.read_text() == "old"


def test_the_content_is_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    write_text(tmp_path / "x.txt", "x")
    assert events == ["fsync", "replace"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.txt"
    with pytest.raises(OSError, match=r"No space left on device: .*x\.txt'$") as caught:
        write_atomically(path, write)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    with pytest.raises(OSError, match=r"^odd$"):
        write_atomically(path, lambda _: (_ for _ in ()).throw(OSError("odd")))


def test_where_files_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for name in (".", "new", "new/below"):
        assert why_unwritable(tmp_path / name) is None
    for name, what in (("file", "file"), ("file/a/b", "file"), ("gone", "gone")):
        assert str(why_unwritable(tmp_path / name)).startswith(f"{tmp_path / what}: ")
    assert sorted(os.listdir(tmp_path)) == ["file", "gone"]


NOBODY = 65534


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="no users here")
@pytest.mark.parametrize("name", [".", "new"])
def test_a_folder_of_others(tmp_path: Path, name: str) -> None:
    """Root may write everywhere: the one who asks is not root."""
    code = f"""
import importlib.util, os, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {str(ROOT / "l0fast" / "_files.py")!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
if os.getuid() == 0:
    os.setuid({NOBODY})
print(files.why_unwritable(Path({name!r})))
"""
    tmp_path.chmod(0o555)
    argv = [sys.executable, "-c", code]
    done = subprocess.run(
        argv, check=True, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout == ".: Permission denied\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("moment", ["writing", "written"])
def test_a_kill_leaves_what_was_there(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import importlib.util
spec = importlib.util.spec_from_file_location("files", {str(ROOT / "l0fast" / "_files.py")!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
from pathlib import Path
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def write(temporary):
    temporary.write_text("ne")
    if {moment!r} == "writing":
        die()
os.replace = die
files.write_atomically(Path({str(path)!r}), write)
"""
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, check=False, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_text() == "old"
    left = sorted(p.name for p in tmp_path.iterdir() if p != path)
    assert left == [p.name for p in tmp_path.glob(PARTS)]  # named so that they can be swept up
    assert len(left) == 1
