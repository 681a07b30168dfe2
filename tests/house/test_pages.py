"""The Python in the pages of docs/ runs as it stands there.

Cells run when the site is built. Plain blocks run here, each with what its page takes for granted.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import l0fast
from l0fast.data.formats import Split
from l0fast.data.sets import Data
from tests import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = ROOT / "docs"
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
FENCED = re.compile(r"^ *```([^\n`]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
OF_OTHERS = {"transformers_models.md"}
"""Its blocks are parts of examples/decoder_trainer.py, which runs by itself."""

Names = dict[str, Any]


class Blocks(nn.Module):
    """A model with parts as those that the pages name."""

    def __init__(self, wide: int = 32) -> None:
        super().__init__()
        pairs = [nn.Sequential(nn.Linear(8, wide), nn.ReLU(), nn.Linear(wide, 8)) for _ in range(2)]
        self.blocks = nn.ModuleList(pairs)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for here, there in pairwise(sizes):
        layers += [nn.Linear(here, there), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def loop(names: Names) -> None:
    """A gated MLP with an optimizer."""
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    names |= {"torch": torch, "F": F, "l0fast": l0fast, "x": x, "steps": 200}
    names["model"] = l0fast.sparsify_(mlp(16, 32, 4), example_inputs=x)
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    names |= {"inputs": x, "targets": torch.arange(8) % 4}


def plain(names: Names) -> None:
    loop(names)
    names["model"] = mlp(16, 32, 4)


def blocks(names: Names) -> None:
    loop(names)
    names |= {"model": Blocks(), "x": torch.randn(8, 8), "fully_shard": fully_shard}


def gated_blocks(names: Names) -> None:
    blocks(names)
    names["model"] = l0fast.sparsify_(names["model"], example_inputs=names["x"])


def large(names: Names) -> None:
    """A model of more than five million MACs."""
    loop(names)
    names["x"] = torch.randn(512, 8)
    names["model"] = l0fast.sparsify_(Blocks(512), example_inputs=names["x"])
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())


def several(names: Names) -> None:
    """The same, of which a latency is measured."""
    large(names)


def hugging_face(names: Names) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    sizes = {"hidden_size": 8, "intermediate_size": 128, "num_hidden_layers": 1}
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, num_channels=1, num_attention_heads=2, **sizes
    )
    pixels = torch.randn(8, 1, 4, 4)
    model = transformers.ViTForImageClassification(config)
    names["example"] = {"pixel_values": pixels}
    names["model"] = l0fast.sparsify_(model, example_inputs=names["example"])
    names["rows"] = [{"pixel_values": one, "labels": torch.tensor(0)} for one in pixels]
    names["arguments"] = transformers.TrainingArguments("out", report_to=[], use_cpu=True)


def lightning(names: Names) -> None:
    pytest.importorskip("lightning")
    loop(names)


def written_out(names: Names) -> None:
    loop(names)
    names["constraint"] = l0fast.DensityConstraint(names["model"], 0.5, steps=names["steps"])


def captured(names: Names) -> None:
    """In place of a CUDA graph: a replay that does nothing."""
    written_out(names)
    names["graph"] = SimpleNamespace(replay=lambda: None)
    names["capture"] = lambda: names["graph"]


def pruned(names: Names) -> None:
    loop(names)
    names["small"] = l0fast.prune(names["model"], names["x"], target=0.5)


def trainer(names: Names) -> None:
    loop(names)
    split = Split(names["inputs"], names["targets"])
    names["data"] = Data(split, None, split)


def datasets(names: Names) -> None:
    names["DataLoader"] = DataLoader
    names["dataset"] = names["test_set"] = TensorDataset(names["inputs"], names["targets"])


def own_task(names: Names) -> None:
    loop(names)
    rows = [{"image": torch.randn(1, 4, 4), "depth": torch.rand(1, 4, 4)} for _ in range(8)]
    names["x"] = torch.randn(1, 1, 4, 4)
    names["model"] = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)
    )
    loader: Any = DataLoader(rows, 4)  # type: ignore[arg-type]
    names |= {"data": Data(loader, None, loader), "settings": l0fast.TrainerSettings(density=0.5)}


def averaged(names: Names) -> None:
    trainer(names)
    settings = l0fast.TrainerSettings(epochs=1, ema=0.9)
    names["trainer"] = l0fast.Trainer(mlp(16, 4), names["data"], settings)


def resnet(names: Names) -> None:
    torchvision = pytest.importorskip("torchvision")
    x = torch.randn(2, 3, 64, 64)
    model = l0fast.sparsify_(torchvision.models.resnet18(num_classes=10), example_inputs=x)
    names |= {"l0fast": l0fast, "x": x, "model": model}


def timed(names: Names) -> None:
    large(names)
    names["table"] = l0fast.measure_latency(names["model"], names["x"])


Before = Callable[[Names], None]
BEFORE: dict[str, list[Before]] = {
    "index.md": [plain],
    "guides/latency.md": [timed],
    "guides/loops.md": [loop, hugging_face, lightning, written_out, captured, pruned],
    "guides/several_processes.md": [plain, gated_blocks],
    "guides/targets.md": [large, several],
    "guides/trainer.md": [trainer, datasets, own_task, averaged],
    "guides/vision_models.md": [resnet],
}
"""Page -> what makes the names that each of its blocks takes for granted."""


def blocks_of(page: Path) -> list[str]:
    """The plain Python blocks of a page."""
    found: list[str] = []
    for indent, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        found.append("".join(line.removeprefix(indent) for line in code.splitlines(True)))
    return found


LONG = (hugging_face, lightning, resnet, several)
"""They take long; the examples and other blocks go the same way."""
CASES = [
    pytest.param(page, at, marks=[pytest.mark.exhaustive] * (before in LONG))
    for page, befores in BEFORE.items()
    for at, before in enumerate(befores)
]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process, as torchrun starts several."""
    dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(("page", "at"), CASES, ids=str)
def test_a_block_runs(
    page: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "guides/several_processes.md":
        request.getfixturevalue("process_group")
    names: Names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of trainings that are too short
        for number in range(at) if BEFORE[page][at] is datasets else ():
            BEFORE[page][number](names)
        BEFORE[page][at](names)
        exec(compile(blocks_of(DOCS / page)[at], page, "exec"), names)


def test_no_block_is_left_out() -> None:
    pages = sorted(DOCS.rglob("*.md"))
    found = {str(page.relative_to(DOCS)): len(blocks_of(page)) for page in pages}
    wanted = {page: len(befores) for page, befores in BEFORE.items()}
    assert {page: count for page, count in found.items() if count} == wanted


def test_python_is_called_python() -> None:
    code = re.compile(r"^\s*(from \w|import \w|\w+ = |l0fast\.\w+\()", re.MULTILINE)
    for page in sorted(DOCS.rglob("*.md")):
        if "_build" in page.parts or page.name in OF_OTHERS:
            continue
        for tag, block in FENCED.findall(page.read_text(encoding="utf-8")):
            assert tag or code.search(block) is None, f"{page.name}: {block}"
