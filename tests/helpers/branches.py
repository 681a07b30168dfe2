"""Models with residual branches, and their gates closed or open by hand."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import gates


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size // heads
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, length, -1))


class Block(nn.Module):
    """A block of a transformer with norms before its branches."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(size), Attention(size, heads)
        self.norm2 = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Of the eight rows of an image, from [B, 64] to [B, 10]."""

    def __init__(self, depth: int = 3, size: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(8, size)
        self.blocks = nn.ModuleList(Block(size, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.unflatten(-1, (8, 8)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class BasicBlock(nn.Module):
    """Of a ResNet; `out` is written in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Three blocks, of which the second changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12), BasicBlock(12, 12))
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.bn(self.stem(x)))).mean((2, 3)))


def with_norms_that_counted(model: nn.Module) -> nn.Module:
    """Gives batch norms statistics and parameters as training leaves them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (*module.parameters(), module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    return model


def branches(model: nn.Module) -> list[str]:
    """The names of a model's gates on branches."""
    return [name for name, layer in gates(model).layers.items() if layer.gates == "branch"]


@torch.no_grad()
def close(model: nn.Module, names: Collection[str], share: float = 0.5) -> None:
    """Closes some branches, and of the gates on units a share by chance; the others get values."""
    chance = torch.Generator().manual_seed(0)
    for name, layer in gates(model).layers.items():
        values = torch.rand(layer.log_alpha.shape, generator=chance) * 3
        closed = torch.rand(values.shape, generator=chance) < share
        if layer.gates == "branch":
            closed = torch.full_like(closed, name in names)
        layer.log_alpha.copy_(values.masked_fill(closed, -5.0))
