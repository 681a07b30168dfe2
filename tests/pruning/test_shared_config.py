"""Sizes that a forward takes from an object which all blocks hold: each block gets its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import load_pruned, prune, save_pruned
from l0fast.layers.handle import gated_layers
from tests.helpers.half_closed import assert_merged, assert_same, half_closed

X = torch.randn(2, 5, 8, dtype=torch.float64)


class Block(nn.Module):
    """Attention with queries, keys and values in one layer, cut where its configuration says."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.head_size = 8 // config.heads
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        width = self.config.heads * self.head_size
        found = self.qkv(x)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in (found[..., :width], found[..., width : 2 * width], found[..., 2 * width :])
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # As many layers as heads, and a width that nobody asks for.
        self.config = SimpleNamespace(heads=4, layers=4, width=8, name="model")
        self.blocks = nn.Sequential(*(Block(self.config) for _ in range(2)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def test_each_block_has_its_own_number(tmp_path: Path) -> None:
    model = half_closed(Model(), X, exclude=["head", "*qkv"])
    with torch.no_grad():
        gated_layers(model)["blocks.1.out"].log_alpha.copy_(torch.tensor([-4.0, 2.0, -4.0, -4.0]))
    small: Any = prune(model, X)
    assert_merged(small)
    assert_same(small, model, X)
    first, second = small.blocks
    assert [block.qkv.out_features for block in small.blocks] == [12, 6]
    assert vars(first.config) == {"heads": 2, "layers": 4, "width": 8, "name": "model"}
    assert (second.config.heads, small.config.heads) == (1, 4)
    assert model.config is model.blocks[0].config is model.blocks[1].config
    assert model.config.heads == 4
    save_pruned(small, tmp_path / "small.safetensors")
    again: Any = load_pruned(lambda: Model().double(), tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(X), small(X))
    assert (again.blocks[0].config.heads, again.config.heads) == (2, 4)
