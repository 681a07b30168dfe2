"""Linears whose weight is [in, out], as GPT-2 is made of: gated, and smaller on both sides."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import (
    DensityConstraint,
    load_pruned,
    param_groups,
    prune,
    prune_optimizer,
    save_pruned,
    sparsify_,
)
from l0fast.constraints.ranking import magnitudes
from l0fast.layers.handle import gated_layers
from tests.helpers.half_closed import assert_merged, assert_same, half_closed

transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

X = torch.randn(2, 5, 6, dtype=torch.float64)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(16, 6), Conv1D(3, 16)
        nn.init.normal_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.cos(self.up(x)))


def gpt2(tied: bool = True) -> Any:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=32, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def test_units_go_and_what_is_left_is_a_conv1d(tmp_path: Path) -> None:
    model = half_closed(Mlp(), X, exclude="up")
    assert gated_layers(model)["down"].gates == "input"
    small: Any = prune(model, X)
    assert_merged(small)
    assert_same(small, model, X)
    assert type(small.up) is type(small.down) is Conv1D
    assert (small.up.nx, small.up.nf, small.down.nx, small.down.nf) == (6, 8, 8, 3)
    assert (small.up.weight.shape, small.down.weight.shape) == ((6, 8), (8, 3))
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(lambda: Mlp().double(), tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(X), small(X))


@pytest.mark.parametrize("gates", ["input", "output", "weight"])
@pytest.mark.parametrize("noise", ["batch", "example"])
def test_gates_do_what_they_do_on_a_linear(gates: str, noise: str) -> None:
    if (gates, noise) == ("weight", "example"):
        return
    linear = nn.Linear(6, 16).double()
    other = Conv1D(16, 6).double()
    with torch.no_grad():
        other.weight.copy_(linear.weight.t())
        other.bias.copy_(linear.bias)
    models = [
        sparsify_(nn.Sequential(layer, nn.Tanh()), gates=gates, noise=noise)
        for layer in (linear, other)
    ]
    one, two = (gated_layers(model)["0"] for model in models)
    with torch.no_grad():
        one.log_alpha.uniform_(-2.0, 2.0)
        transposed = one.log_alpha.dim() == 2
        two.log_alpha.copy_(one.log_alpha.t() if transposed else one.log_alpha)
    assert one.group_size == two.group_size
    found, expected = magnitudes(two), magnitudes(one)
    torch.testing.assert_close(found.t() if transposed else found, expected)
    for training in (False, *[True] * (gates != "weight")):  # single weights are drawn in order
        results = []
        for model in models:
            torch.manual_seed(1)
            y = model.train(training)(X)
            y.square().sum().backward()
            results.append(y)
        torch.testing.assert_close(results[1], results[0])
        torch.testing.assert_close(two.weight.grad, one.weight.grad.t())
    again = pickle.loads(pickle.dumps(models[1].eval()))
    assert torch.equal(again(X), models[1](X))


def test_a_layer_of_another_kind_is_refused() -> None:
    model = sparsify_(Mlp(), example_inputs=X.float())
    with pytest.raises(TypeError, match="got 'Linear'; expected a Conv1D of transformers"):
        type(gated_layers(model)["down"]).from_dense(nn.Linear(2, 3))


class Clamped(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=0.1)


def test_a_subclass_with_another_forward_has_no_gates() -> None:
    model = nn.Sequential(nn.Linear(6, 4), Clamped(4, 4), nn.Linear(4, 2))
    assert list(gated_layers(sparsify_(model, gates="input"))) == ["0", "2"]


def test_gpt2_loses_units_and_heads_and_writes_the_same() -> None:
    tokens = torch.randint(1, 50, (2, 7))
    model = half_closed(gpt2(), tokens)
    with torch.no_grad():  # another number of heads in each layer
        layers = gated_layers(model)
        layers["transformer.h.0.attn.c_proj"].log_alpha.copy_(torch.tensor([2.0, -4.0, -4.0, -4.0]))
    small: Any = prune(model, tokens)
    assert_merged(small)
    assert [block.attn.c_attn.nf for block in small.transformer.h] == [24, 48]
    assert [block.attn.split_size for block in small.transformer.h] == [8, 16]
    assert [block.mlp.c_fc.nf for block in small.transformer.h] == [64, 64]
    assert small.lm_head.weight is small.transformer.wte.weight
    fresh = torch.randint(1, 50, (3, 9))
    with torch.no_grad():
        torch.testing.assert_close(small(fresh).logits, model(fresh).logits)
    for cached in (True, False):
        written = [
            one.generate(fresh, max_new_tokens=6, do_sample=False, use_cache=cached)
            for one in (small, model)
        ]
        assert torch.equal(*written)


def test_a_training_holds_its_target_and_goes_on_after_pruning() -> None:
    tokens = torch.randint(1, 50, (2, 7))
    model = sparsify_(gpt2(), example_inputs=tokens)
    constraint = DensityConstraint(
        model, target=0.6, measure="macs", example_inputs=tokens, steps=6
    )
    optimizer = torch.optim.Adam(param_groups(model, lr=1e-3, steps=6))
    for _ in range(6):
        loss = model(tokens, labels=tokens).loss + constraint()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()
    small: Any = prune(model, tokens)
    after, before = small.report.macs
    assert after <= 0.6 * before
    other = prune_optimizer(optimizer, model, small)
    moments = other.state[small.transformer.h[0].mlp.c_fc.weight]["exp_avg"]
    assert moments.shape == small.transformer.h[0].mlp.c_fc.weight.shape
    assert moments.any()
