"""What every test runs under: poisoned memory, a fixed seed, few threads, no silent GPU."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# cuBLAS is deterministic only with a fixed workspace, and reads this when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# A test that plots must not look for a display.
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers have the cores, and what they start has not
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.helpers import once

if TYPE_CHECKING:  # a GPU machine that runs only the kernels' tests need not load it
    from matplotlib.figure import Figure

    from l0fast.data.sets import Data

SEED = 20210
MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# More threads than this cost small operations more than they give, and the sums of a run with
# many cores would differ from those of one with few.
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers have the cores
    torch.set_num_threads(1)
elif "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))

try:
    import hypothesis
except ImportError:  # a GPU machine that runs only the kernels' tests may lack it
    pass
else:
    # Nothing depends on how busy the machine is or on what an earlier run found.
    hypothesis.settings.register_profile("l0fast", deadline=None, derandomize=True, database=None)
    hypothesis.settings.load_profile("l0fast")


def poison(on: bool) -> None:
    """Fill what is allocated and not written, by PyTorch's own switch below Python.

    empty_like, new_empty, empty_strided and resize_ are covered, dispatch modes count no extra
    operation, and torch.compile traces as before. The switch works only with deterministic
    algorithms: an operation that has none raises on a GPU. What Inductor allocates for itself is
    not filled.
    """
    # torch.use_deterministic_algorithms would import Inductor and with it Triton, and Triton must
    # not be imported before a test has chosen its interpreter.
    torch._C._set_deterministic_algorithms(on, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = on  # pyright: ignore[reportAttributeAccessIssue]


poison(True)  # from here on, so that fixtures of wider scope allocate poisoned memory too


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every torch.empty is NaN (integers: their largest value), whoever allocates it."""
    poison(request.node.get_closest_marker("unpoisoned") is None)
    yield
    poison(True)


@pytest.fixture(autouse=True, scope="session")
def unplotted() -> Iterator[None]:
    """A trainer's plot takes seconds: in this process its file has the numbers in place of their
    picture. The command in test_resume.py draws it."""

    def write(history: Any, targets: Any, summary: Any, path: Path) -> None:
        path.write_bytes(b"\x89PNG" + json.dumps([history, targets], sort_keys=True).encode())

    with pytest.MonkeyPatch.context() as patch:
        if (folder := sys.modules.get("l0fast.training.folder")) is not None:
            patch.setattr(folder, "plot_dynamics", write)
        yield


@pytest.fixture(autouse=True, scope="session")
def shared_by_processes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is made once for a run lies where all of pytest-xdist's processes find it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        once.shared = tmp_path_factory.getbasetemp().parent


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test's draws do not depend on the tests before it."""
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For operations so small that they only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Data:
    """The embedded digits, a twelfth of them held out to select by."""
    from l0fast.data import sets

    return sets.load("digits", validation_fraction=1 / 12)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloads fail at once: nothing listens on the proxy's port."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: None
) -> Iterator[Path]:
    """The command starts in an empty folder, without data or network; its switches are undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("L0FAST_DATA_ROOT", raising=False)
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_flush_denormal(False)
    torch.set_num_threads(threads)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved."""
    from matplotlib.figure import Figure

    saved: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        saved.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root holding a copy of MNIST, which a test may unpack or damage."""
    named = os.environ.get("L0FAST_DATA_ROOT")
    if not named:
        pytest.skip("L0FAST_DATA_ROOT is not set: it names the folder that holds MNIST/raw")
    raw = Path(named) / "MNIST" / "raw"
    missing = [
        f for f in MNIST_FILES if not any((raw / (f + end)).is_file() for end in ("", ".gz"))
    ]
    if missing:
        pytest.skip(f"L0FAST_DATA_ROOT={named}: MNIST/raw lacks {', '.join(missing)}")
    root = tmp_path_factory.mktemp("data")
    (root / "MNIST" / "raw").mkdir(parents=True)
    for source in sorted(raw.iterdir()):
        if source.is_file():  # copyfile leaves a read-only source's mode behind
            shutil.copyfile(source, root / "MNIST" / "raw" / source.name)
    return root
