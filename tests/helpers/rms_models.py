"""Small language models with RMS norms in front of all that reads the residual stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Decomposed(nn.Module):
    """As in LLaMA, in plain ops."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(size))
        self.variance_epsilon = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(mean + self.variance_epsilon))


class OnePlus(nn.Module):
    """As in Gemma: the weight is 1 + it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) - 0.5)
        self.eps = 1e-2

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def torch_norm(size: int) -> nn.Module:
    """That of PyTorch, with the eps of its dtype."""
    norm = nn.RMSNorm(size)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    return norm


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "own": Decomposed,
    "gemma": OnePlus,
    "torch": torch_norm,
}


class Block(nn.Module):
    """Attention of two heads and a gated MLP, each behind a norm, and perhaps in front of one."""

    def __init__(self, size: int, norm: Callable[[int], nn.Module], post: bool) -> None:
        super().__init__()
        self.norm, self.mlp_norm = norm(size), norm(size)
        self.post = norm(size) if post else nn.Identity()
        self.qkv = nn.ModuleList(nn.Linear(size, 8, bias=False) for _ in range(3))
        self.out = nn.Linear(8, size)
        self.gate, self.up = nn.Linear(size, 10), nn.Linear(size, 10)
        self.down = nn.Linear(10, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        read, (batch, length) = self.norm(x), x.shape[:2]
        q, k, v = (layer(read).view(batch, length, -1, 4).transpose(1, 2) for layer in self.qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.post(self.out(attended.transpose(1, 2).reshape(batch, length, -1)))
        read = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(read)) * self.up(read))


class Language(nn.Module):
    """Tokens in, logits out."""

    def __init__(
        self,
        norm: Callable[[int], nn.Module] = Decomposed,
        tied: bool = True,
        post: bool = False,
        blocks: int = 1,
        head: Any = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.blocks = nn.ModuleList(Block(12, norm, post) for _ in range(blocks))
        self.norm = norm(12) if head is None else head
        self.head = nn.Linear(12, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tokens(batch: int = 2) -> Tensor:
    """An example."""
    return torch.randint(20, (batch, 6))
