"""Heads that lie in one dimension with the batch: the number of heads follows, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import prune, sparsify_
from l0fast.pruning.views import ViewPatch


class Folded(nn.Module):
    """Attention whose heads are examples of a larger batch, as a number of heads says."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        length, batch, _ = x.shape
        size = (length, batch * self.heads, -1)
        q, k, v = (one(x).reshape(size).transpose(0, 1) for one in (self.q, self.k, self.v))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return self.proj(torch.bmm(weights, v).transpose(0, 1).reshape(length, batch, -1))


class FoldedConv(nn.Module):
    """The same with queries, keys and values of one convolution, one after another in each head."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.proj = nn.Conv1d(16, 48, 1), nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, length = x.shape
        q, k, v = self.qkv(x).reshape(batch * self.heads, -1, length).chunk(3, dim=1)
        weights = torch.einsum("bct,bcs->bts", q, k).softmax(-1)
        return self.proj(torch.einsum("bts,bcs->bct", weights, v).reshape(batch, -1, length))


class Whole(nn.Module):
    """Attention that takes the number of numbers in a head from what enters."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.q, self.proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        size = (batch, length, self.heads, width // self.heads)
        q = self.q(x).view(size).transpose(1, 2).reshape(batch * self.heads, length, -1)
        mixed = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
        return self.proj(mixed.view(batch, self.heads, length, -1).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Folded, (5, 2, 16)), (FoldedConv, (3, 16, 5)), (Whole, (2, 5, 16))],
)
def test_the_number_of_heads_follows(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    model: Any = nn.Sequential(kind()).double().eval()
    sparsify_(model, example_inputs=x)
    assert model[0].proj.log_alpha.numel() == 4
    with torch.no_grad():
        model[0].proj.log_alpha.copy_(torch.tensor([9.0, -9.0, 9.0, -9.0]))
    small: Any = prune(model, x)
    assert small.report.tier == "merged"
    assert small[0].proj.weight.shape[1] == 8
    assert {row["status"] for row in small.report.sites} == {"removed"}
    other = torch.randn([size + 1 if size < 16 else size for size in shape], dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(other), model(other), rtol=1e-10, atol=1e-10)
    for row in small.report.views:
        assert ViewPatch.from_json(row).as_json() == row
