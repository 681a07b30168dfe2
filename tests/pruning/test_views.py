"""Sizes that a module's own code computes from what enters: the module is made anew."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import load_pruned, prune, save_pruned, sparsify_
from l0fast.pruning.views import ViewPatch, _traced


class Attention(nn.Module):
    """Attention whose code takes the width of its heads from what enters it."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.drop = 4, drop
        self.q, self.kv, self.proj = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: Tensor, grid: tuple[int, int], mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        x = x.reshape(B, *grid, C).flip(1).flatten(1, 2)
        heads = self.num_heads
        q = self.q(x).reshape(B, N, heads, C // heads).transpose(1, 2)
        k, v = self.kv(x).reshape(B, -1, 2, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if mask is not None:
            k = k + mask
        p = self.drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Windows(nn.Module):
    """Attention within windows: its code pads, and slices only where it has padded."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.size = 4, 3
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        more = (self.size - N % self.size) % self.size
        x = F.pad(x, (0, 0, 0, more))
        number = (N + more) // self.size
        qkv = self.qkv(x.reshape(B, number, self.size, C))
        qkv = qkv.reshape(B, number, self.size, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        x = x.reshape(B, N + more, C)
        if more > 0:
            x = x[:, :N].contiguous()
        return self.proj(x)


class Halves(nn.Module):
    """A layer whose outputs are split into two halves, of which one goes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 32
        self.both, self.way, self.last = nn.Linear(16, 32), nn.Linear(16, 8), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).relu().split(self.width // 2, dim=-1)
        return self.last(torch.cat([first, self.way(second)], -1))


class Counting(Halves):
    """The same with buffers: an order of what enters, and the number of calls."""

    order: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(15, -1, -1), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x[..., self.order])


class Replacing(Counting):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = torch.ones(())
        return super().forward(x)


class Net(nn.Module):
    """Both of them, in residual blocks."""

    def __init__(self, drop: float = 0.0, halves: type[Halves] = Halves) -> None:
        super().__init__()
        self.attention, self.halves, self.head = Attention(drop), halves(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        grid = (2, x.shape[1] // 2)
        x = x + self.attention(x, grid)
        return self.head(x + self.halves(x))


NAMES = ["attention.proj", "halves.way", "halves.last"]


@functools.cache
def pruned(drop: float = 0.0, halves: type[Halves] = Halves) -> tuple[Any, Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    model: Any = sparsify_(Net(drop, halves).double(), include=NAMES, gates="input").eval()
    with torch.no_grad():
        for name in NAMES:
            model.get_submodule(name).log_alpha.fill_(9.0)
        model.attention.proj.log_alpha[4:12] = -9.0
        model.halves.way.log_alpha[[1, 3, 7]] = -9.0
        model.halves.last.log_alpha[:5] = -9.0
    return prune(model, x), model, x


def same(small: nn.Module, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return bool((small(x) - model(x)).abs().max() <= 1e-10 * model(x).abs().max())


def test_modules_are_made_anew_with_the_sizes_that_are_left(tmp_path: Path) -> None:
    small, model, x = pruned()
    assert small.report.tier == "merged"
    assert (small.attention.q.out_features, small.attention.kv.out_features) == (8, 16)
    assert (small.halves.both.out_features, small.halves.way.in_features) == (24, 13)
    assert [row["kind"] for row in small.report.views] == ["Attention", "Halves"]
    other = torch.randn(3, 8, 16, dtype=torch.float64)
    assert all(same(small, model, one) for one in (x, other))
    assert list(small.state_dict()) == list(Net().state_dict())
    save_pruned(small, tmp_path / "small.safetensors")
    loaded = load_pruned(lambda: Net().double(), tmp_path / "small.safetensors").eval()
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), loaded):
        assert torch.equal(twin(other), small(other))
        assert list(twin.state_dict()) == list(small.state_dict())
    assert b"l0fast" not in pickle.dumps(small.attention)
    small.train()(x).sum().backward()
    small.eval()
    assert small.attention.kv.weight.grad is not None
    with pytest.raises(AssertionError, match="mask: expected None"):
        small.attention(x, (2, 3), x)


def test_buffers_stay_what_they_are() -> None:
    small, model, x = pruned(halves=Counting)
    assert same(small, model, x)
    assert type(small.halves) is not Counting
    assert small.halves.both.out_features == 24
    assert list(small.state_dict()) == list(Net(halves=Counting).state_dict())
    before = small.halves.calls.clone()
    small(x)
    assert small.halves.calls == before + 1


def test_a_forward_that_replaces_a_buffer_stays() -> None:
    small, model, x = pruned(halves=Replacing)
    assert same(small, model, x)
    assert type(small.halves) is Replacing
    assert "its forward changes its attributes" in "\n".join(small.report.notes)


def test_what_is_another_forward_in_training_stays_and_is_named() -> None:
    small, model, x = pruned(drop=0.1)
    assert same(small, model, x)
    assert small.report.tier == "merged except across reshapes"
    assert type(small.attention) is Attention
    assert small.halves.both.out_features == 24
    notes = "\n".join(small.report.notes)
    assert "the forward of attention cannot be written again" in notes
    assert "it does something else in training" in notes


def test_a_recipe_of_views_is_of_the_same_forward(tmp_path: Path) -> None:
    small, _, _ = pruned()
    save_pruned(small, tmp_path / "small.safetensors")

    class Other(Halves):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cat([x, self.way(x)], -1))

    Other.__name__ = "Halves"

    def build() -> nn.Module:
        model = Net().double()
        model.halves = Other().double()
        return model

    with pytest.raises(ValueError, match="the forward of its 'halves' is another one"):
        load_pruned(build, tmp_path / "small.safetensors")
    entry = small.report.views[1]
    assert ViewPatch.from_json(entry).as_json() == entry
    for key, value in (("views", {}), ("views", {"split": [0, 3]}), ("name", ""), ("more", 1)):
        with pytest.raises((ValueError, TypeError)):
            ViewPatch.from_json({**entry, key: value})


@pytest.mark.parametrize("length", [7, 6])
def test_a_forward_that_slices_by_sizes_does_so_for_all_sizes(length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, length, 16, dtype=torch.float64)
    model: Any = nn.Sequential(Windows()).double().eval()
    sparsify_(model, example_inputs=x)
    with torch.no_grad():
        model[0].proj.log_alpha.copy_(torch.tensor([9.0, -9.0, -9.0, 9.0]))
    small: Any = prune(model, x)
    assert small.report.tier == "merged"
    assert small[0].qkv.out_features == 24
    (row,) = small.report.views
    assert row["kind"] == "Windows"
    # What is left of all heads is a number, and no share of the stream that they are added to.
    assert list(row["views"].values()) == [[None, None, None, 3, 2, 4], [None, None, 8]]
    for other in (6, 7, 8, 9):
        assert same(small, model, torch.randn(3, other, 16, dtype=torch.float64))
    assert torch.equal(pickle.loads(pickle.dumps(small))(x), small(x))


class Decides(nn.Module):
    """A forward of two paths, and what they are for each length."""

    def __init__(self, path: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        if n > 3 or n == 1:
            x = self.path(x)
        return x.relu() + x


def test_what_two_paths_differ_in_is_computed_beside_each_other() -> None:
    module = Decides(lambda x: x[:, :2].contiguous())
    graph = _traced(module, {}, {})
    made = torch.fx.GraphModule(module, graph)
    for length in (1, 2, 3, 4, 5):
        x = torch.randn(2, length)
        assert torch.equal(made(x), module(x))
    with pytest.raises(ValueError, match="decides by eq whether it calls"):
        _traced(Decides(lambda x: x.exp()), {}, {})
