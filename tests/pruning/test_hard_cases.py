"""What breaks other pruners, one test each: still the same function, and really smaller."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.helpers.plain_models as plain
from l0fast import DensityConstraint, param_groups, prune, prune_optimizer, sparsify_
from l0fast.layers.handle import gated_layers
from tests.helpers.half_closed import assert_merged, assert_same, half_closed
from tests.helpers.thinned import thinned_product
from tests.helpers.zoo import GPT2, FusedAttention, Llama, SplitAttention, tokens


def image(channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(2, channels, size, size, dtype=torch.float64)


def live(model: nn.Module) -> nn.Module:
    """Batch norms with statistics and an affine part as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


class Shuffled(nn.Module):
    """Convolutions in two groups, with a channel shuffle in between, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 1)
        self.first = nn.Conv2d(12, 12, 1, groups=2)
        self.second = nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        return self.head(torch.relu(self.second(x)))


def test_channel_shuffle() -> None:
    """A unit is followed to its new place: `second` reads channel 0, 6, 1, 7, ... of `first`."""
    model = half_closed(Shuffled(), image(), gates="output", include=["stem", "second"])
    with torch.no_grad():
        model.stem.log_alpha.copy_(torch.tensor([4.0] * 6 + [-4.0] * 6))
    small: Any = prune(model, image())
    assert_same(small, model, image())
    assert small.head.in_channels == 6

    model = half_closed(Shuffled(), image(), gates="input", include="second")
    with torch.no_grad():  # both channels of a pair, so that the view by two halves still fits
        model.second.log_alpha.copy_(torch.tensor([4.0, 4.0, -4.0, -4.0] * 3))
    small = prune(model, image())
    assert_same(small, model, image())
    second: Any = small.second
    layer = second.get_submodule("layer") if isinstance(second, nn.Sequential) else second
    assert layer.in_channels == 6


NOT_ZERO_AT_ZERO: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "cos": torch.cos,
    "hardsigmoid": F.hardsigmoid,
    "exp": torch.exp,
    "x + 1": lambda x: x + 1.0,
}


class Through(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.last = nn.Conv2d(8, 4, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.norm(self.first(x))))


@pytest.mark.parametrize("name", NOT_ZERO_AT_ZERO)
@pytest.mark.parametrize("gates", ["auto", "output"])
def test_activations_that_are_not_zero_at_zero(name: str, gates: str) -> None:
    """A closed channel is f(0) where it is read, and zero where the next layer pads."""
    model = half_closed(Through(NOT_ZERO_AT_ZERO[name]), image(), gates=gates, include=["*st"])
    small: Any = prune(model, image())
    for _ in range(3):
        assert_same(small, model, image())
    if gates == "auto":  # the gates are where the channels are read
        assert_merged(small)
        assert small.first.out_channels == small.last.in_channels == 4


@pytest.mark.parametrize("gates", ["auto", "output"])
def test_a_live_batch_norm(gates: str) -> None:
    """A closed channel leaves the norm as a constant, which padding turns into an edge."""
    options = {} if gates == "auto" else {"include": "first"}
    model = half_closed(live(Through(torch.relu, norm=True)), image(), gates=gates, **options)
    small: Any = prune(model, image())
    for _ in range(3):
        assert_same(small, model, image())
    if gates == "auto":
        assert_merged(small)
        assert small.first.out_channels == small.norm.num_features == small.last.in_channels == 4


@pytest.mark.parametrize(
    ("attention", "seed"), thinned_product(3, [FusedAttention, SplitAttention], range(3))
)
def test_fused_queries_keys_and_values(attention: Any, seed: int) -> None:
    """Whole heads go, from the three thirds of one Linear."""
    torch.manual_seed(seed)
    model = half_closed(GPT2(attention), tokens())
    small: Any = prune(model, tokens())
    assert_same(small, model, tokens())
    for block in small.h:
        if attention is SplitAttention:
            assert block.attn.num_heads == 2
            assert block.attn.qkv.out_features == 3 * block.attn.proj.in_features == 24
        else:  # its sizes come from the input's: the module is made anew
            assert block.attn.c_attn.out_features == 24


def test_tied_embeddings() -> None:
    """The head stays the embedding, the file has it once, and the model does not grow."""
    model = half_closed(GPT2(SplitAttention), tokens())
    small: Any = prune(model, tokens())
    assert_same(small, model, tokens())
    assert small.lm_head.weight is small.wte.weight
    assert torch.equal(small.wte.weight, model.wte.weight)
    untied = sum(parameter.numel() for parameter in small.parameters())
    assert untied == small.report.params[0] < small.report.params[1]


def test_grouped_query_attention() -> None:
    """A key head goes with all the query heads that read it, and with no others."""
    model = half_closed(Llama(), tokens())
    small: Any = prune(model, tokens())
    assert_same(small, model, tokens())
    assert_merged(small)
    assert (small.q_proj.out_features, small.o_proj.in_features) == (8, 8)
    assert (small.k_proj.out_features, small.v_proj.out_features) == (4, 4)


class Rotary(nn.Module):
    """Attention as in Phi-3: of each head it turns the first features, here all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 12) for _ in range(3))
        self.out, self.heads = nn.Linear(12, 8), 3

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.heads, 4)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.q, self.k, self.v))
        q, k = (torch.cat([part[..., :4].neg(), part[..., 4:]], -1) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


@pytest.mark.parametrize("closed", [1, 3])
def test_features_that_are_none(closed: int) -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    model = half_closed(Rotary(), x)
    assert model.out.num_gates == 3
    with torch.no_grad():
        model.out.log_alpha[:closed], model.out.log_alpha[closed:] = -9.0, 1.0
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.heads == max(1, 3 - closed)
    assert small.report.collapsed == (["out"] if closed == 3 else [])


class WaveNet(nn.Module):
    """The last sum along its residual stream is computed, and nobody reads it."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.added = added
        self.start = nn.Conv1d(1, 8, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(8, 16, 3, padding=1) for _ in range(2))
        self.residual = nn.ModuleList(nn.Conv1d(8, 8, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(8, 12, 1) for _ in range(2))
        self.end = nn.Conv1d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), torch.zeros(())
        for dilated, residual, skip in zip(self.dilated, self.residual, self.skip, strict=True):
            value, gate = dilated(x).chunk(2, 1)
            value = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(value)
            step = residual(value)
            if self.added or residual is self.residual[0]:
                x = x + step
        return self.end(torch.relu(total))


@pytest.mark.parametrize("added", [True, False])
def test_a_layer_whose_output_nobody_reads(added: bool) -> None:
    """It follows what it reads and is added to; an output that is nobody's else stays."""
    x = torch.randn(2, 1, 9, dtype=torch.float64)
    model = half_closed(WaveNet(added), x)
    assert gated_layers(model).keys() >= {"dilated.0", "residual.1", "skip.1", "end"}
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert_merged(small)
    assert small.start.out_channels == small.dilated[1].in_channels == 4
    assert small.residual[1].in_channels == small.skip[1].in_channels == 4
    assert small.residual[1].out_channels == (4 if added else 8)


class Auxiliary(nn.Module):
    """Its second head runs always, and is read in training alone."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 6, 1)
        self.first, self.second = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 5, 1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Conv2d(6, 2, 1)
        if normed:
            self.first = nn.utils.parametrizations.weight_norm(self.first)

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.stem(x))
        other = self.second(torch.relu(self.first(self.norm(x)))).flatten(1)
        y = self.head(torch.relu(self.body(x)))
        return (y, other) if self.training else y


@pytest.mark.parametrize("normed", [True, False])
def test_what_is_read_in_training_alone_stays(normed: bool) -> None:
    x = image()
    table = sparsify_(Auxiliary(normed).double(), example_inputs=x, dry_run=True)
    reasons = {row.name: row.reason for row in table.layers}
    assert reasons["second"].endswith("an output that nobody reads") is not normed
    model = half_closed(live(Auxiliary(normed)), x)
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert_merged(small)
    assert small.body.out_channels == small.head.in_channels == 3
    model.training = small.training = True  # with the norm in evaluation
    torch.testing.assert_close(small(x)[1], model(x)[1])
    assert small.first.out_channels == small.second.in_channels == 8
    # What a layer with weight_norm reads is all there.
    assert small.stem.out_channels == small.norm.num_features == (10 if normed else 5)


def test_frozen_parameters_stay_frozen() -> None:
    """What the user does not train is not trained by gates, pruning or what comes after."""
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    live(model)
    frozen = ["0.weight", "0.bias", "1.weight", "3.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    x = image()
    model = half_closed(model, x)
    before = {name: model.get_parameter(name).detach().clone() for name in frozen}
    constraint = DensityConstraint(model, 0.5)
    optimizer = torch.optim.Adam(param_groups(model, lr=0.1, gate_lr=0.01))
    model.train()
    gates = [layer.log_alpha.detach().clone() for layer in gated_layers(model).values()]
    for _ in range(3):
        (model(x).square().mean() + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value), name
    moved = zip(gates, gated_layers(model).values(), strict=True)
    assert all(not torch.equal(gate, layer.log_alpha) for gate, layer in moved)
    model.eval()
    small: Any = prune(model, x)
    assert_same(small, model, x)
    assert small.report.params[0] < small.report.params[1]
    left = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
    assert left == set(frozen)
    after = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    carried = prune_optimizer(optimizer, model, small)
    small.train()(x).square().mean().backward()
    carried.step()
    changed = {n for n, p in small.named_parameters() if not torch.equal(p, after[n])}
    assert changed == set(after) - set(frozen)


def test_a_fully_closed_layer() -> None:
    """One unit of zeros stands for it, the rest of the model goes on, and the report says so."""
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    model = half_closed(live(model), image())
    with torch.no_grad():
        model[3].log_alpha.fill_(-9.0)
    small: Any = prune(model, image())
    assert_same(small, model, image())
    assert small.report.collapsed == ["3"]
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == 1
    assert not bool(small[3].weight.any())
    assert small[6].in_channels == 3  # what comes behind it, from its bias, is as before


@pytest.mark.parametrize("gates", ["input", "output"])
def test_a_module_called_twice(gates: str) -> None:
    """It gets smaller where both calls agree, and its weight stays one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.block = nn.Sequential(
                nn.Conv2d(6, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 6, 1)
            )
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            return self.head(x + self.block(x + self.block(x)))

    model = half_closed(live(Twice()), image(), gates=gates)
    small: Any = prune(model, image())
    assert_same(small, model, image())
    assert small.report.tier == "merged"
    if gates == "output":
        assert small.block[0].out_channels < 10
    kept, dense = small.report.params
    assert kept < 0.75 * dense


@pytest.mark.parametrize("gates", ["auto", "input", "output", "weight"])
def test_a_model_that_export_refuses(gates: str) -> None:
    """Each layer by itself, on either path; and the table says why beforehand."""
    x = torch.rand(4, 6, dtype=torch.float64)
    if gates == "auto":
        table = sparsify_(plain.DataDependent().double(), example_inputs=x, dry_run=True)
        assert "torch.export refuses the model" in table.note
    with pytest.warns(UserWarning, match="Call") if gates == "auto" else nullcontext():
        model = half_closed(plain.DataDependent(), x, gates=gates)
    small: Any = prune(model, x)
    for example in (x, -x):
        assert_same(small, model, example)
    assert small.report.tier == "each layer by itself"
    assert "torch.export refuses" in small.report.notes[0]
    if gates != "weight":
        assert small.report.params[0] < small.report.params[1]
