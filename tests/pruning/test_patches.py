"""Sizes written out in a model's own code: which attributes follow, and where none can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import load_pruned, prune, save_pruned, sparsify_
from l0fast.pruning.attributes import AttributePatch


class Split(nn.Module):
    """Splits what a layer makes by the sizes that its attributes say."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.width, self.decoy = 8, 16, 8
        self.both, self.last = nn.Linear(4, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.both(x).view(-1, self.width).split(self.size, -1)
        return self.last(first * second.sigmoid()) * (self.decoy - 7)


class Pair(nn.Module):
    """Two of them, one of which no attribute patch fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.fixed = Split(), Split()
        self.fixed.forward = self.written_out  # type: ignore[method-assign]

    def written_out(self, x: Tensor) -> Tensor:
        first, second = self.fixed.both(x).split(8, -1)
        return self.fixed.last(first * second.sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.good(x) + self.fixed(x)


def closed(model: nn.Module, names: list[str]) -> Any:
    sparsify_(model.double(), include=names, gates="input").eval()
    with torch.no_grad():
        for name in names:
            model.get_submodule(name).log_alpha[[1, 2, 6]] = -9.0  # type: ignore[index, operator]
    return model


def same(small: nn.Module, model: nn.Module, x: Tensor) -> bool:
    with torch.no_grad():
        return bool((small(x) - model(x)).abs().max() <= 1e-10 * model(x).abs().max())


def test_attributes_that_hold_a_size_follow_it_and_no_others() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    model = closed(Split(), ["last"])
    small: Any = prune(model, x)
    assert same(small, model, x)
    assert (small.size, small.width, small.decoy) == (5, 10, 8)
    assert (model.size, model.width) == (8, 16)
    assert small.both.out_features == 10
    assert small.report.tier == "merged"
    assert small.report.notes == []
    assert {row["attribute"]: row["value"] for row in small.report.attributes} == {
        "size": [5, 8],
        "width": [10, 16],
    }


def test_where_no_attribute_helps_the_shape_stays_and_the_rest_shrinks() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    model = closed(Pair(), ["good.last", "fixed.last"])
    small: Any = prune(model, x)
    assert same(small, model, x)
    assert small.report.tier == "merged except across reshapes"
    assert small.good.both.out_features == 10
    assert small.fixed.both.layer.out_features == 10  # computed, among 16 that are there
    assert small.fixed.both.scatter.index.numel() == 16
    assert small.fixed.last.gather.index.tolist() == [0, 3, 4, 5, 7]
    assert {row["name"] for row in small.report.attributes} == {"good"}


def test_a_patch_is_read_back_or_refused() -> None:
    patch = AttributePatch("h.0", "Attention", "num_heads", (3, 4))
    assert AttributePatch.from_json(patch.as_json()) == patch
    for key, value in (("value", [5, 4]), ("value", [0, 4]), ("value", [3]), ("more", 1)):
        with pytest.raises((ValueError, TypeError)):
            AttributePatch.from_json({**patch.as_json(), key: value})


class Part(nn.Module):
    """Adds to the first units of a stream, as many as its attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.decoy = 12, 12
        self.add = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.width], x[:, self.width :]
        return torch.cat([first + self.add(first.relu()), rest], 1) * (self.decoy - 11)


class Cut(nn.Module):
    """Adds to the first units of a stream and puts others in the place of as many others."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 10
        self.add, self.new = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.width], x[:, self.width :]
        return torch.cat([first + self.add(first.relu()), self.new(rest.relu())], 1)


def test_the_place_of_a_slice_is_told_from_other_sizes() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    model: Any = nn.Sequential(nn.Linear(6, 20), Cut(), Cut(), nn.ReLU(), nn.Linear(20, 3))
    # Of the first ten units 8 are left everywhere; of the others 6 before the first, 9 before the
    # second.
    shut = {"1.add": [1, 3], "1.new": [2, 3, 4, 5], "2.add": [1, 3], "2.new": [7], "4": [1, 3]}
    sparsify_(model.double(), include=list(shut), gates="input").eval()
    with torch.no_grad():
        for name, closed_ones in shut.items():
            gates = model.get_submodule(name).log_alpha
            gates.fill_(9.0)
            gates[closed_ones] = -9.0
    small: Any = prune(model, x)
    assert same(small, model, x)
    assert small.report.tier == "merged"
    assert [part.width for part in (small[1], small[2])] == [8, 8]
    assert (small[0].out_features, small[1].new.out_features) == (14, 9)


def test_modules_that_slice_the_same_stream_are_patched_together() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=torch.float64)
    model: Any = nn.Sequential(nn.Linear(6, 20), Part(), Part(), nn.ReLU(), nn.Linear(20, 3))
    names = ["1.add", "2.add", "4"]
    sparsify_(model.double(), include=names, gates="input").eval()
    with torch.no_grad():
        for name in names:
            gates = model.get_submodule(name).log_alpha
            gates.fill_(9.0)
            gates[[1, 3] if len(gates) == 12 else [1, 3, 15]] = -9.0
    small: Any = prune(model, x)
    assert same(small, model, x)
    assert small.report.tier == "merged"
    assert small[0].out_features == 17
    assert [(part.width, part.decoy) for part in (small[1], small[2])] == [(10, 12)] * 2


class Parted(nn.Module):
    """Splits what a layer makes into parts of sizes that one attribute holds."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.sizes, self.both, self.last = sizes, nn.Linear(4, 24), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        gate, first, second = torch.split(self.both(x), self.sizes, -1)
        return self.last(gate.sigmoid() * torch.cat([first, second.relu()], -1))


@pytest.mark.parametrize("kind", [tuple, list])
def test_sizes_of_all_parts_follow_in_a_tuple_or_a_list(kind: Any, tmp_path: Path) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)

    def build() -> nn.Module:
        model: Any = Parted(kind([16, 6, 10]))
        model.both = nn.Linear(4, 32)
        return model.double()

    model: Any = closed(build(), ["last"])
    small: Any = prune(model, x)
    assert same(small, model, x)
    assert (small.report.tier, small.both.out_features) == ("merged", 26)
    assert small.sizes == kind([13, 4, 9])  # of units 1, 2 and 6
    assert model.sizes == kind([16, 6, 10])
    save_pruned(small, tmp_path / "small.safetensors")
    loaded: Any = load_pruned(build, tmp_path / "small.safetensors")
    assert loaded.sizes == small.sizes
    assert torch.equal(loaded(x), small(x))


class Checked(nn.Module):
    """A layer behind a check of its width, which no view shows."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.layer = 16, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == self.channels
        return self.layer(x)


class Heads(nn.Module):
    """Splits units into heads, as many as an attribute says."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first = 4, nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).unflatten(-1, (self.heads, 4)).relu().flatten(-2)


def test_a_check_that_fails_once_what_is_before_it_is_smaller_is_patched_with_it() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(Heads(), Checked(), nn.ReLU(), nn.Linear(16, 3))
    sparsify_(model.double(), include=["1.layer", "3"], gates="input").eval()
    with torch.no_grad():
        for name in ("1.layer", "3"):
            model.get_submodule(name).log_alpha.fill_(9.0)[4:8] = -9.0  # type: ignore[operator]
    small: Any = prune(model, x)
    assert same(small, model, x)
    assert (small.report.tier, small.report.notes[1:]) == ("merged", [])
    assert (small[0].heads, small[1].channels) == (3, 12)
    assert small[0].first.out_features == small[1].layer.in_features == 12
