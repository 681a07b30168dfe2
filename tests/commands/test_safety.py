"""What a command does with files of others, other processes, and whatever ends it."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast._files import FolderLock, locked
from l0fast.commands import runs
from l0fast.commands.shell import answer
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import PRUNED, SUMMARY
from l0fast.training.stepping import Stepping
from tests import ROOT
from tests.helpers.command import refused, run
from tests.helpers.fuzz import replaced, write_checkpoint
from tests.helpers.thinned import thinned

pytestmark = pytest.mark.usefixtures("a_folder_of_its_own")

FAST = ["train", "--widths", "8-4", "--epochs", "1", "--device", "cpu", "--threads", "1", "--quiet"]
FAST += ["--batch-size", "512", "--density", "0.5"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), "."])}
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
needs_locks = pytest.mark.skipif(os.name == "nt", reason="no flock here")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of FAST; to be read only."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(*FAST, "--out", str(out)) == 0
    return out


def saved(finished: Path, at: tuple[Any, ...], value: Any) -> str:
    """A checkpoint like that of the finished run, but for one entry."""
    state = torch.load(finished / CHECKPOINT, weights_only=True)
    write_checkpoint(Path("odd.pt"), replaced(state, at, value))
    return "odd.pt"


# --- code that a checkpoint names -----------------------------------------------------------------


@pytest.mark.parametrize("command", ["prune", "report"])
def test_code_runs_only_if_the_user_names_it(
    finished: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"evil_{command}"
    Path(f"{name}.py").write_text("open('ran', 'w').close()\ndef net(): pass\n")
    state = torch.load(saved(finished, ("identity", "model"), f"{name}:net"), weights_only=True)
    write_checkpoint(Path("odd.pt"), replaced(state, ("identity", "widths"), None))
    path = "odd.pt"
    message = refused(capsys, command, path)
    assert f"expected --model {name}:net beside it: the checkpoint names code, which" in message
    assert not Path("ran").exists()
    message = refused(capsys, command, path, "--model", "other:net")
    assert f"model: got 'other:net'; expected '{name}:net', which the checkpoint odd.pt" in message
    assert not Path("ran").exists()
    assert run(command, path, "--model", f"{name}:net") == 2  # it builds no model
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("identity", "widths"), [8, 4, 2**40]),
        (("identity", "widths"), "8-4"),
        (("identity", "model"), 7),
        (("identity", "recipe"), "other"),
        (("identity", "density"), "many"),
        (("identity", "epochs"), -1),
        (("history",), []),
        (("model", "fc1.weight"), torch.zeros(8, 64, dtype=torch.int64)),
        (("term", "_extra_state"), 3),
        (("format",), 9),
    ],
    ids=str,
)
def test_an_odd_checkpoint_is_one_line(
    finished: Path, at: tuple[Any, ...], value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(finished / CHECKPOINT, weights_only=True)
    path = Path("odd.pt")
    write_checkpoint(path, {**state, at[0]: value} if len(at) == 1 else replaced(state, at, value))
    assert "Error: " not in refused(capsys, "report", "odd.pt").partition(" (")[0]


# --- several processes ----------------------------------------------------------------------------


@needs_locks
def test_one_process_trains_in_a_folder(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(finished, "run")
    lock = FolderLock(Path("run"))
    lock.acquire()
    message = refused(capsys, *FAST, "--out", "run", "--resume")
    assert "out: got 'run'; expected a folder that no other run is writing into" in message
    lock.release()
    assert run(*FAST, "--out", "run", "--resume") == 0


def test_what_the_living_write_stays_and_what_the_dead_left_goes(finished: Path) -> None:
    shutil.copytree(finished, "run")
    done = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], stdout=-1, check=True
    )
    dead, living = int(done.stdout), os.getppid()
    for pid in (dead, living):
        Path("run", f".{CHECKPOINT}.{pid}.part").touch()
        Path("run", f".{PRUNED}.folder.{pid}.part").mkdir()
    Path("run", f".mine.{'part'}").touch()  # not one of ours: no process in its name
    assert run(*FAST, "--out", "run", "--resume") == 0
    left = sorted(path.name for path in Path("run").glob(".*"))
    assert left == [f".{CHECKPOINT}.{living}.part", ".mine.part", f".{PRUNED}.folder.{living}.part"]


def _finish_elsewhere(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    """Does some work, as another process would, in the middle of the next training."""
    first = [True]
    train = runs.run_trainer

    def both(*args: Any) -> Any:
        if first:
            first.clear()
            work()
        return train(*args)

    monkeypatch.setattr(runs, "run_trainer", both)


COMPARE = ["compare", *FAST[1:], "--methods", "dense,magnitude", "--seeds", "0", "--out", "c"]


def test_two_processes_share_a_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own --only: no row of the other is lost."""
    _finish_elsewhere(monkeypatch, lambda: run(*COMPARE, "--only", "magnitude-*"))
    assert run(*COMPARE, "--only", "dense-*") == 0
    numbers = json.loads(Path("c/compare.json").read_text())
    assert [row["name"] for row in numbers["rows"]] == ["dense", "magnitude"]
    assert list(numbers["runs"]) == ["dense-seed-0", "magnitude-seed-0"]


def test_what_another_process_has_trained_is_not_trained_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _finish_elsewhere(monkeypatch, lambda: run(*COMPARE, "--only", "magnitude-*"))
    assert run(*COMPARE) == 0
    said = capsys.readouterr().out
    assert "2 of 2: magnitude" not in said
    assert "2 of 2 runs are done" in said


@needs_locks
def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    lock.acquire()
    with pytest.raises(BlockingIOError, match="is writing here"), locked(tmp_path, patience=0.0):
        pass
    threading.Timer(0.2, lock.release).start()
    with locked(tmp_path, patience=30.0):
        pass


def test_a_damaged_summary_is_a_run_that_is_not_done(finished: Path) -> None:
    content = (finished / SUMMARY).read_text()
    summary = json.loads(content)
    assert runs.read_summary(finished / SUMMARY)["epochs"] == 1
    path = Path("summary.json")
    for changed in (
        content.replace('"params": ', '"params": 1'),
        json.dumps({**summary, "sha256": "0"}),
        json.dumps({k: v for k, v in summary.items() if k not in ("seconds", "sha256")}),
        json.dumps({k: v for k, v in summary.items() if k != "sha256"} | {"architecture": "x"}),
        "[" * 10**6,
    ):
        path.write_text(changed)
        assert runs.read_summary(path) == {}


# --- what is not installed ------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["matplotlib", "tqdm", "sklearn"])
def test_a_missing_extra_is_named_before_anything(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(capsys, *FAST, "--out", "run")
    assert f'{module}: not installed; expected pip install "l0fast[train]"' in message


def test_the_summary_comes_before_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError("no picture")

    monkeypatch.setattr("l0fast.training.folder.plot_dynamics", broken)
    assert run(*FAST, "--out", "run") == 2
    assert Path("run", SUMMARY).exists()


# --- one line, whatever happens -------------------------------------------------------------------


@needs_fifo
@pytest.mark.parametrize(
    "arguments",
    [
        ("report", "fifo"),
        ("prune", "fifo", "--out", "x"),
        (*FAST, "--measure", "latency", "--latency-table", "fifo", "--out", "run"),
        (*FAST, "--pretrained", "fifo", "--out", "run"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_a_fifo_does_not_hang(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("fifo")
    assert "fifo" in refused_beside_a_fifo(capsys, *arguments)


@needs_fifo
def test_a_fifo_in_place_of_what_is_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    os.mkfifo(Path("run", CHECKPOINT))
    os.mkfifo(Path("run", SUMMARY))
    assert "no regular file" in refused_beside_a_fifo(capsys, *FAST, "--out", "run", "--resume")
    assert runs.read_summary(Path("run", SUMMARY)) == {}


def refused_beside_a_fifo(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "words",
    [
        ("--widths", "9" * 30),
        ("--widths", "1000000000-1000000000"),
        ("--epochs", "9" * 30),
        ("--batch-size", "9" * 30),
        ("--seed", "9" * 30),
        ("--threads", "9" * 30),
        ("--lr", "nan"),
        ("--shrink", "9" * 30),
        ("--epochs", "9" * 5000),
    ],
    ids=lambda words: words[0],
)
def test_numbers_beyond_all_are_one_line(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(capsys, *FAST, *words, "--out", "run")


def test_seeds_beyond_all_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("0-99999999999", "0-4000000000", "9" * 5000):
        refused(capsys, *COMPARE, "--seeds", text)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError("deep"), MemoryError(), OSError(5)]
)
def test_whatever_is_raised_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> int:
        raise error

    assert answer(work, "name", None) == 2
    said = capsys.readouterr().err
    assert said.startswith("name: ")
    assert said.count("\n") == 1
    monkeypatch.setenv("L0FAST_TRACEBACK", "1")
    with pytest.raises(type(error)):
        answer(work, "name", None)


def test_a_closed_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as after >&- in a shell
    assert answer(lambda: print("to nobody") or 0, "name", None) == 0
    assert capsys.readouterr().err == ""


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.formatwarning

    def work() -> int:
        sys.stderr.write(warnings.formatwarning("two\nlines\x1b", UserWarning, "x.py", 3))
        return 0

    assert answer(work, "name", None) == 0
    assert capsys.readouterr().err == "name: warning: two lines\\x1b\n"
    assert warnings.formatwarning is before


def test_escape_sequences_are_shown_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "report", "\x1b[2J\u202etp.txt")
    assert "\x1b" not in message
    assert "x1b[2J" in message
    assert answer(lambda: print("\x1b]0;title\x07 ünïcode\nmore") or 0, "name", None) == 0
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 ünïcode\nmore\n"


def test_letters_that_the_terminal_lacks(finished: Path) -> None:
    arguments = [sys.executable, "-m", "l0fast", "report", "ü.pt"]
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(arguments, env=environment, check=False, capture_output=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith(b"l0fast report: checkpoint: got '\\xfc.pt'; expected")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, 2**15, 2**15, 2**15)),
        gzip.compress(struct.pack(">BBBBIII", 0, 0, 8, 3, 1, 28, 28) + bytes(10**6)),
    ],
    ids=["it says so", "it does not say so"],
)
def test_a_file_that_would_unpack_to_anything(
    content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (raw / f"{part}-{kind}.gz").write_bytes(content)
    message = refused(capsys, *FAST, "--dataset", "mnist", "--data-root", "data", "--out", "run")
    assert "a whole idx file of MNIST (" in message


# --- signals --------------------------------------------------------------------------------------


def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def training(*words: str) -> Generator[subprocess.Popen[str]]:
    """A process that trains for long, once its first checkpoint is there."""
    arguments = [
        sys.executable,
        "-m",
        "l0fast",
        *FAST,
        "--epochs",
        "100000",
        "--out",
        "run",
        *words,
    ]
    process = subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stderr=-1,
        stdout=-1,
        text=True,
        # Shells start jobs in the background with Ctrl-C ignored, and that is inherited.
        preexec_fn=None if os.name == "nt" else heed_interrupts,  # noqa: PLW1509
    )
    try:
        end = time.monotonic() + 200
        while not Path("run", "metrics.jsonl").exists() and time.monotonic() < end:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="no such signals here")
@pytest.mark.parametrize(
    ("number", "code", "word"),
    thinned([(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interr")], 2),
)
def test_a_signal_ends_it_in_one_line(number: int, code: int, word: str) -> None:
    with training() as process:
        process.send_signal(number)
        _, error = process.communicate(timeout=100)
    assert process.returncode == code
    assert error.startswith(f"l0fast train: {word}")
    assert "--resume goes on from the last epoch" in error
    assert error.count("\n") == 1
    assert not list(Path("run").glob(".*"))  # nothing half written
    assert torch.load(Path("run", CHECKPOINT), weights_only=True)["format"] == 2


@pytest.mark.skipif(os.name == "nt", reason="no such signals here")
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "l0fast: terminated\n"),
        (signal.SIGINT, 130, "l0fast: interrupted\n"),
        # A shell has its jobs in the background ignore Ctrl-C: so does the command.
        (signal.SIG_IGN, 1, "it went on\n"),
    ],
)
def test_a_signal_while_pytorch_is_loaded(number: int, code: int, said: str) -> None:
    sent = int(signal.SIGINT if number == signal.SIG_IGN else number)
    source = f"import os, sys\nos.kill(os.getpid(), {sent})\nsys.exit('it went on')\n"
    Path("torch.py").write_text(source)

    def begin() -> None:
        heed_interrupts()
        if number == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-m", "l0fast", *FAST],
        env=ENVIRONMENT | {"PYTHONPATH": f".{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        preexec_fn=begin,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.skipif(os.name == "nt", reason="no such signals here")
def test_workers_that_end_by_the_same_signal_are_no_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """PyTorch's handler raises for each worker that was killed, also while a loader is deleted."""

    def raises(*_: Any) -> None:
        raise RuntimeError("DataLoader worker is killed by signal: Terminated")

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGCHLD)
        return 0

    before = signal.signal(signal.SIGCHLD, raises)
    try:
        assert answer(work, "name", None) == 143
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert capsys.readouterr().err == "name: terminated\n"


@pytest.mark.skipif(os.name == "nt", reason="no such signals here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_ignores_a_signal_that_the_shell_ignores(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert answer(lambda: os.kill(os.getpid(), number) or 0, "name", None) == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_command_without_resume_promises_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("l0fast.commands.pruning._rebuilt", interrupt)
    monkeypatch.setattr(Stepping, "epoch", interrupt)
    assert run("report", "x") == 130
    assert capsys.readouterr().err == "l0fast report: interrupted\n"
    assert run(*COMPARE) == 130
    assert "the same command goes on from the last epoch" in capsys.readouterr().err
