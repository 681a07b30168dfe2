"""A run that was killed goes on and ends as if nothing had happened, bit for bit.

Most kills hit forks of one process that has imported everything, since importing takes longer than
training; their code is the command's, and a real process is killed while it starts, too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast import Trainer, TrainerSettings, prune, sparsify_
from l0fast._files import PARTS
from l0fast.data import sets
from l0fast.plots import dynamics
from l0fast.training import models
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import FILES, METRICS, PLOT, PRUNED, SUMMARY
from l0fast.training.tensorboard import TENSORBOARD
from tests import ROOT
from tests.helpers.plain_models import Noisy
from tests.helpers.same_run import Stop, assert_same_run, summary
from tests.helpers.thinned import telling, thinned

pytestmark = pytest.mark.usefixtures("one_thread")

KILLS = 12
MAIN_WRITES = 2 * 3 + 3
"""Files written by 2 epochs: checkpoint and metrics at the start and after each; the pruned model,
the picture, the summary."""
COMMAND = ["train", "--dataset", "digits", "--widths", "16-8", "--device", "cpu", "--threads", "1"]
COMMAND += ["--quiet", "--density", "0.5", "--gate-lr", "0.05", "--dual-lr", "0.1", "--epochs"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


# --- the process that forks ----------------------------------------------------------------------


def warm_up() -> None:
    """Imports what the command imports on its way, by using it; without a backward pass, after
    which autograd would not run in a fork."""
    for name in ("sklearn.datasets", "torch.utils.flop_counter", "tqdm", "l0fast.cli"):
        importlib.import_module(name)
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorboard.summary.writer.record_writer")
    torch.set_num_threads(1)
    model = sparsify_(models.build("mlp", (1, 8, 8), 10, (4,)))
    torch.optim.AdamW(model.parameters(), fused=True).zero_grad()
    prune(model, torch.randn(1, 1, 8, 8))
    row = {"epoch": 1, "train_error_percent": 1.0, "test_error_percent": 1.0}
    picture: Any = io.BytesIO()
    dynamics.plot_dynamics([row], None, {"seed": 0} | row, picture)


def serve() -> None:
    """For each request on standard input, a fork that runs the command; then how it ended."""
    warm_up()
    command = importlib.import_module("l0fast.cli").main
    for line in sys.stdin:
        request = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            sink = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            forbid_writing_in_place()
            if request["writes"] is not None:
                die_before_write(request["writes"])
            code = 1
            try:
                code = command(request["argv"])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        seconds = request["seconds"]
        ended = status = 0
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if not ended and seconds is not None and time.monotonic() - started >= seconds:
                os.kill(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0)
            time.sleep(0.0005)
        took = time.monotonic() - started
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "took": took}), flush=True)


def forbid_writing_in_place() -> None:
    """Ends this process with 7 where it opens one of the run's files to write into it.

    A kill would have to come within microseconds to show a file that is written in its place.
    """

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            writing = arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writing and Path(os.fsdecode(arguments[0])).name in FILES:
                os._exit(7)

    sys.addaudithook(watch)


def die_before_write(writes: int) -> None:
    """Lets `writes` files reach their place, then kills this process at the next."""
    replace = os.replace
    left = [writes]

    def count(source: Any, target: Any) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        replace(source, target)

    os.replace = count


def environment() -> dict[str, str]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return os.environ | one_thread | {"PYTHONPATH": path, "MPLBACKEND": "agg"}


class Server:
    """Runs commands in forks of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / "log"
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, out: Path, *argv: str, seconds: float | None = None, writes: int | None = None
    ) -> tuple[int, float]:
        """(exit code, seconds) of a run into `out`, killed after `seconds` or `writes` files."""
        request = {
            "argv": [*COMMAND, *argv, "--resume", "--out", str(out)],
            "log": str(self.log),
            "seconds": seconds,
            "writes": writes,
        }
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        assert answer["code"] in (0, -signal.SIGKILL), self.log.read_text()
        return answer["code"], answer["took"]

    def undisturbed(self, *argv: str) -> Path:
        """The folder of a whole run, which is done once; to be read only."""
        out = self.folder / "-".join(argv)
        if not (out / SUMMARY).exists():
            assert self.run(out, *argv)[0] == 0
        return out


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("server"))
    yield one
    assert one.process.stdin is not None
    assert one.process.stdout is not None
    one.process.stdin.close()
    assert one.process.wait(timeout=60) == 0
    one.process.stdout.close()


# --- how runs are compared -----------------------------------------------------------------------


def assert_whole(out: Path) -> None:
    """After a kill, every file that is there can be read; parts have names of their own."""
    from PIL import Image
    from safetensors import safe_open

    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} - {path.name for path in out.glob(PARTS)}
    assert names <= {*FILES, TENSORBOARD, "dense"}
    rows: list[Any] = []
    if METRICS in names:
        text = (out / METRICS).read_text()
        assert not text or text.endswith("\n")
        rows = [json.loads(line) for line in text.splitlines()]
    if CHECKPOINT in names:
        history = torch.load(out / CHECKPOINT, weights_only=True)["history"]
        # The checkpoint comes first: the metrics may be one epoch behind.
        assert rows == history[: len(rows)]
        assert len(history) - len(rows) in (0, 1)
    else:
        assert not names
    if SUMMARY in names:
        json.loads((out / SUMMARY).read_text())
    if PLOT in names:
        with Image.open(out / PLOT) as image:
            image.load()
    if PRUNED in names:
        with safe_open(out / PRUNED, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                file.get_tensor(name)
    if "dense" in names:
        assert_whole(out / "dense")


# --- kills ---------------------------------------------------------------------------------------


@needs_fork
@pytest.mark.slow
@pytest.mark.exhaustive
def test_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    """12 kills over the whole run; each run goes on until it is done."""
    argv = ["3"]
    wanted = server.undisturbed(*argv)
    code, took = server.run(tmp_path / "again", *argv)  # the first warms up what the disk holds
    assert code == 0
    assert_same_run(tmp_path / "again", wanted)
    moments = random.Random(20210)
    kills = runs = 0
    while kills < KILLS:
        out = tmp_path / f"run-{runs}"
        runs += 1
        code = -1
        for _ in range(50):
            # After the last, let it finish.
            seconds = moments.uniform(0, took) if kills < KILLS else None
            code, _ = server.run(out, *argv, seconds=seconds)
            if code == 0:
                break
            kills += 1
            assert_whole(out)
        assert code == 0
        assert_same_run(out, wanted)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("writes", telling(range(MAIN_WRITES + 1), [3, 7, MAIN_WRITES]))
def test_killed_at_every_write(server: Server, tmp_path: Path, writes: int) -> None:
    """A kill just before each file gets its place: the moments that chance would seldom hit."""
    out, wanted = tmp_path / "out", server.undisturbed("2")
    code, _ = server.run(out, "2", writes=writes)
    if writes == MAIN_WRITES:  # there are no more
        assert code == 0
    else:
        assert code == -signal.SIGKILL
        assert_whole(out)
        assert len(list(out.glob(PARTS))) == 1
        code, _ = server.run(out, "2")
        assert code == 0
    assert_same_run(out, wanted)


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize(
    "writes", telling([-1, MAIN_WRITES, MAIN_WRITES + 3, -2], [MAIN_WRITES + 3])
)
def test_killed_in_the_baseline(server: Server, tmp_path: Path, writes: int) -> None:
    """The same for the dense model of --compare-dense, after the main run is whole."""
    out, argv = tmp_path / "out", ["2", "--compare-dense"]
    wanted = server.undisturbed(*argv)
    if writes < 0:  # counted from the end: the summary with the dense error comes last
        writes += MAIN_WRITES + 2 * 3 + 2 + 1
    code, _ = server.run(out, *argv, writes=writes)
    assert code == -signal.SIGKILL
    assert_whole(out)
    assert "dense_test_error_percent" not in summary(out)
    code, _ = server.run(out, *argv)
    assert code == 0
    assert_same_run(out, wanted)
    assert "dense_test_error_percent" in summary(out)


@needs_fork
@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_process_killed_while_it_starts(server: Server, tmp_path: Path) -> None:
    """`python -m l0fast` itself, which ends as its fork does."""
    out, wanted = tmp_path / "out", server.undisturbed("1")
    argv = [sys.executable, "-m", "l0fast", *COMMAND, "1", "--resume", "--out", str(out)]
    process = subprocess.Popen(argv, env=environment(), stdout=subprocess.DEVNULL)
    time.sleep(random.Random(20210).uniform(0, 2))
    process.kill()
    process.wait(timeout=60)
    assert_whole(out)
    subprocess.run(argv, env=environment(), check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert_same_run(out, wanted)


# --- the same within one process, for other models and methods -----------------------------------


@pytest.mark.parametrize(
    ("model", "settings", "epochs_done"),
    thinned(
        [
            ("mlp", {"layer_density": {"fc1": 0.6, "fc[23]": 0.7}, "schedule": "constant"}, 1),
            ("mlp", {"penalty": 0.3, "penalty_per_example": True}, 2),
            ("mlp", {"density": 0.4, "dual": "pi", "target_schedule": "cubic"}, 1),
            ("mlp", {"density": 0.4, "dual": "augmented", "dual_first": True}, 2),
            ("mlp", {"density": 0.4, "dual": "equality", "target_schedule": "linear"}, 2),
            ("mlp", {}, 1),
            ("mlp", {}, 0),
            ("lenet5", {"density": 0.5}, 1),
            ("own", {"density": 0.6}, 2),
            ("own", {"density": 0.6}, 3),
            ("mlp", {"density": 0.4, "skip": True}, 1),
            ("own", {"density": 0.4, "skip": True}, 2),
            ("own", {"density": 0.9, "select": "best"}, 2),
            ("mlp", {"select": "best"}, 2),
            ("own", {"density": 0.4, "method": "magnitude"}, 1),
        ],
        3,
    ),
)
def test_resumed_in_a_new_trainer(
    model: str, settings: dict[str, Any], epochs_done: int, tmp_path: Path
) -> None:
    digits = sets.load("digits", validation_fraction=0.5)

    def trainer(out: str) -> Trainer:
        torch.manual_seed(5)
        widths = {"mlp": (16, 8), "lenet5": (4, 6, 16)}
        dense = Noisy() if model == "own" else models.build(model, (1, 8, 8), 10, widths[model])
        chosen = TrainerSettings(epochs=3, gate_lr=0.05, dual_lr=0.2, **settings)
        return Trainer(dense, digits, chosen, out=tmp_path / out, device="cpu")

    trainer("undisturbed").fit()
    first = trainer("out")

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == epochs_done:
            raise Stop("stopped")

    if epochs_done:
        with pytest.raises(Stop, match="stopped"):
            first.fit(on_epoch=stop)
    else:
        first.open()
        first.folder.close()  # its process ends
    torch.manual_seed(99)  # another process draws something else
    rows: list[int] = []
    second = trainer("out")
    second.fit(resume=True, on_epoch=lambda row: rows.append(row["epoch"]))
    assert rows == list(range(epochs_done + 1, 4))
    assert_same_run(tmp_path / "out", tmp_path / "undisturbed")


if __name__ == "__main__":
    serve()
