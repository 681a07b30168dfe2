"""Tables of relative positions with a column for each head: heads go with their columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, load_pruned, prune, prune_state_dict, save_pruned, sparsify_
from l0fast.layers.handle import gated_layers, own_gates
from tests.helpers.half_closed import assert_merged, assert_same, half_closed

X = torch.randn(2, 5, 8, dtype=torch.float64)


def distances(length: int) -> Tensor:
    """[length, length] how far apart two places are, in 0 ... 8."""
    places = torch.arange(length)
    return (places[:, None] - places).clamp(-4, 4) + 4


class Attention(nn.Module):
    """Four heads; a bias is added to the scores of each."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) + bias
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Windows(nn.Module):
    """A parameter as a table, whose rows an index picks, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(9, 4))
        self.register_buffer("index", distances(5))
        self.attention, self.head = Attention(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(5, 5, -1).permute(2, 0, 1)  # type: ignore[operator]
        return self.head(self.attention(x, bias.unsqueeze(0)))


class Stack(nn.Module):
    """An embedding as a table for all layers, for any length, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.layers, self.head = nn.ModuleList([Attention(), Attention()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(distances(x.shape[1])).permute(2, 0, 1).unsqueeze(0)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x)


class Masked(nn.Module):
    """A bias of zeros, as wide as an attribute says, takes the mask, as across T5's halves."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.layers, self.head = nn.ModuleList([Attention(), Attention()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.where(x.mean(2) > 1, -9.0, 0.0)[:, None, None]
        bias = torch.zeros((1, self.heads, x.shape[1], x.shape[1]), dtype=x.dtype) + mask
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x)


class Told(Stack):
    """The rows are picked by what the model is given."""

    def forward(self, x: Tensor) -> Tensor:
        bias = self.table(x[0, :, :5].abs().clamp(max=8).long()).permute(2, 0, 1)
        return self.head(self.layers[0](x, bias))


def options() -> dict[str, Any]:
    return {"exclude": ["head", "*qkv"]}


@pytest.mark.parametrize("build", [Windows, Stack])
def test_heads_go_with_their_columns(build: type[nn.Module], tmp_path: Path) -> None:
    model = half_closed(build(), X, **options())
    assert len(own_gates(gated_layers(model))) == 1  # the layers of a stack have them together
    table = model.table if build is Windows else model.table.weight
    nn.init.normal_(table)
    small: Any = prune(model, X)
    assert_merged(small)
    assert_same(small, model, X)
    found = small.table if build is Windows else small.table.weight
    assert torch.equal(found, table[:, 2:])
    assert isinstance(found, nn.Parameter)
    if build is Stack:
        assert small.table.embedding_dim == 2
        assert_same(small, model, torch.randn(3, 9, 8, dtype=torch.float64))
        assert [layer.qkv.out_features for layer in small.layers] == [12, 12]
    name = "table" if build is Windows else "table.weight"
    assert torch.equal(prune_state_dict(model.state_dict(), model, small)[name], found)
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(lambda: build().double(), tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(X), small(X))


def test_heads_go_with_a_tensor_as_wide_as_an_attribute_says() -> None:
    model = half_closed(Masked(), X, **options())
    assert len(own_gates(gated_layers(model))) == 1  # one tensor is added to both
    small: Any = prune(model, X)
    assert_merged(small)
    assert_same(small, model, X)
    assert_same(small, model, torch.randn(3, 9, 8, dtype=torch.float64))
    assert small.heads == 2
    assert [layer.qkv.out_features for layer in small.layers] == [12, 12]


def test_what_a_table_costs_is_reckoned() -> None:
    model = sparsify_(Stack().double(), example_inputs=X, **options())
    DensityConstraint(model, 0.8, measure="params", example_inputs=X)  # asks one trial whether so
    small: Any = prune(model, X, target=0.8)
    after, before = small.report.params
    assert (after, before) == (sum(p.numel() for p in small.parameters()), 639)
    assert small.table.weight.shape == (9, small.layers[0].out.in_features // 2)


def test_a_table_whose_rows_the_input_picks_stays() -> None:
    rows = sparsify_(Told().double(), example_inputs=X, dry_run=True)
    reasons = {row.name: row.reason for row in rows.layers}  # type: ignore[attr-defined]
    assert "must stay" in reasons["layers.0.out"]
