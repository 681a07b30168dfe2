"""Small mixtures of experts, as users write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import gates

EXPERTS, PICKED = 6, 2


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Sparse(nn.Module):
    """Each expert computes the tokens that are sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.router = nn.Linear(8, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        weights, picked = self.router(x).softmax(-1).topk(PICKED, -1)
        y = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            token, column = torch.where(picked == place)
            y = y.index_add(0, token, weights[token, column, None] * expert(x[token]))
        return y


class Dense(nn.Module):
    """Each expert computes all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.router = nn.Linear(8, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        return sum(weights[:, i, None] * one(x) for i, one in enumerate(self.experts))  # type: ignore[return-value]


class Together(nn.Module):
    """The weights of all experts are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.num_experts = nn.Linear(8, EXPERTS), EXPERTS
        self.up = nn.Parameter(torch.randn(EXPERTS, 8, 12) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 12, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        logits, picked = self.router(x).topk(PICKED, -1)
        weights = x.new_zeros(len(x), self.num_experts).scatter(-1, picked, logits.softmax(-1))
        inner = F.gelu(torch.einsum("td,edf->tef", x, self.up))
        return torch.einsum("tef,efd,te->td", inner, self.down, weights)


KINDS: list[type[nn.Module]] = [Sparse, Dense, Together]


class Model(nn.Module):
    """Mixtures between two Linears, from [tokens, 5] to [tokens, 3]."""

    def __init__(self, kind: Callable[[], nn.Module] = Sparse, depth: int = 1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.RMSNorm(8) for _ in range(depth + 1))
        self.mixtures = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm, mixture in zip(self.norms, self.mixtures, strict=False):
            x = x + mixture(norm(x))
        return self.last(self.norms[-1](x))


def tokens(number: int = 60) -> Tensor:
    """An example."""
    return torch.randn(number, 5, generator=torch.Generator().manual_seed(number))


GATES = [1.0, -5.0, 0.3, -5.0, 2.0, -0.5]
"""log_alpha of the experts, of which the second and the fourth are closed."""
KEPT = [0, 2, 4, 5]


@torch.no_grad()
def close(model: nn.Module, experts: list[float] = GATES, share: float = 0.4) -> None:
    """Closes some experts, and of the other gates a share by chance."""
    chance = torch.Generator().manual_seed(0)
    for layer in gates(model).layers.values():
        values = torch.rand(layer.log_alpha.shape, generator=chance) * 3
        closed = torch.rand(values.shape, generator=chance) < share
        values = values.masked_fill(closed, -5.0)
        layer.log_alpha.copy_(torch.tensor(experts) if layer.gates == "expert" else values)
