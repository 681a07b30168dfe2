"""RMS norms: which modules are one, what gates do in one, and what is left without channels."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from l0fast.layers.rms_norm import form_of, gated_norm, without_channels_
from tests.helpers.rms_models import NORMS, Decomposed


class Times(nn.Module):
    """No norm: a factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_what_is_an_rms_norm_is_found_by_trial() -> None:
    found = {name: form_of(norm(6)) for name, norm in NORMS.items()}
    assert {name: (f.eps, f.offset) for name, f in found.items() if f} == {
        "own": ("variance_epsilon", 0.0),
        "gemma": ("eps", 1.0),
        "torch": ("eps", 0.0),
    }
    others = nn.LayerNorm(4), nn.LayerNorm(4, bias=False), Times(), nn.Linear(4, 4), nn.PReLU(4)
    assert [form_of(other) for other in others] == [None] * 5


@pytest.mark.parametrize("kind", NORMS)
def test_without_channels_that_are_zero_it_gives_the_same(kind: str) -> None:
    norm: Any = NORMS[kind](9).double()
    channels = torch.tensor([0, 3, 4, 8])
    x = torch.zeros(5, 9, dtype=torch.float64)
    x[:, channels] = 0.01 * torch.randn(5, 4, dtype=torch.float64)  # eps matters
    wanted = norm(x)[:, channels]
    without_channels_(norm, channels)
    assert norm.weight.shape == (4,)
    torch.testing.assert_close(norm(x[:, channels]), wanted, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("kind", NORMS)
def test_a_gated_norm_counts_open_channels_alone(kind: str) -> None:
    norm = NORMS[kind](6)
    gated: Any = gated_norm(norm, controls=1)
    with torch.no_grad():
        gated.log_alpha.copy_(torch.tensor([-5.0, 0.0, 9.0, -5.0, 0.5, 9.0]))
    gated.eval()
    x, z = torch.randn(3, 6), gated.evaluation_gates()
    assert 0 < int((z == 0).sum()) < int((z < 1).sum()) < 6
    given = gated(x)
    torch.testing.assert_close(given, norm(x * (z > 0)) * z)
    folded = gated.folded(z)
    assert type(folded) is type(norm)
    torch.testing.assert_close(folded(x * (z > 0)), given)
    given.sum().backward()
    # A gate between 0 and 1 learns; a closed one, as everywhere, does not.
    assert gated.log_alpha.grad.ne(0).tolist() == [False, True, False, False, True, False]


def test_a_gated_norm_copies_and_pickles() -> None:
    gated: Any = gated_norm(Decomposed(5), controls=7)
    gated.eval()
    x = torch.randn(2, 5)
    for other in (copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))):
        assert isinstance(other, Decomposed)
        assert other.controls == other.group_size == 7
        assert torch.equal(other(x), gated(x))
    with pytest.raises(TypeError, match="norm: got 'LayerNorm'"):
        gated_norm(nn.LayerNorm(3), controls=1)
