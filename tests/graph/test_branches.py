"""Which residual branches are found, and what takes their place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast.graph.branches import Branches
from l0fast.graph.calls import Example
from l0fast.graph.compare import values_of
from l0fast.graph.cuts import Cut, cut_, cut_names, plan_cut
from l0fast.graph.standins import calls_of
from l0fast.graph.structure import Structure
from tests.helpers.branches import Attention, ResNet, Transformer, with_norms_that_counted


def silenced(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 0


def found(model: nn.Module, example: Example) -> Branches:
    trace = Structure.of(model, example).trace
    assert trace is not None
    return Branches(model, trace, calls_of(model, example))


class PostNorm(nn.Module):
    """Norms behind the additions, and one inside a branch behind its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(8, 2), nn.LayerNorm(8)
        self.up, self.down, self.norm2 = nn.Linear(8, 20), nn.Linear(20, 8), nn.LayerNorm(8)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + F.dropout(self.attn(x), 0.1, self.training))
        return x + self.gamma * self.norm2(self.down(F.gelu(self.up(x))))


class ReadElsewhere(nn.Module):
    """What the branch gives is read by something else, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return (x + y) * y


class WrittenOut(nn.Module):
    """A product of matrices in a forward that is not the branch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out((self.a(x) @ self.b(x).mT) @ x)


class Tied(nn.Module):
    """A branch with the weight of a layer outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.fc(x)


class Twice(nn.Module):
    """A branch that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc(x)
        return x + self.fc(x)


class NotResidual(nn.Module):
    """Sums of two layers, and of a layer and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(2, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x)) + self.table


TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("build", "x", "hosts", "blocks"),
    [
        (
            lambda: Transformer(2),
            torch.randn(2, 64),
            ["blocks.0.attn.proj", "blocks.0.mlp.2", "blocks.1.attn.proj", "blocks.1.mlp.2"],
            ["blocks.0", "blocks.0", "blocks.1", "blocks.1"],
        ),
        (ResNet, IMAGES, ["blocks.0.bn2", "blocks.2.bn2"], [None, None]),
        (PostNorm, TOKENS, ["attn.proj", "norm2"], [None, None]),
        (ReadElsewhere, TOKENS, [], []),
        (WrittenOut, TOKENS, [], []),
        (Tied, TOKENS, [], []),
        (Twice, TOKENS, [], []),
        (NotResidual, TOKENS, [], []),
    ],
)
def test_found(build: Callable[[], nn.Module], x: Tensor, hosts: list[str], blocks: Any) -> None:
    model = build().eval()
    result = found(model, Example((x,))).found
    assert [one.name for one in result] == hosts
    assert [None if one.block is None else one.block.name for one in result] == blocks


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize(
    ("build", "x"),
    [(Transformer, torch.randn(2, 64)), (ResNet, IMAGES), (PostNorm, TOKENS)],
)
def test_without_branches(build: Callable[[], nn.Module], x: Tensor, drop: bool) -> None:
    """A model without some branches gives what it gives where their last layers give zeros."""
    model = with_norms_that_counted(build()).eval()
    result = found(model, Example((x,))).found[:2]
    cut = plan_cut(model, result, drop)
    small = cut_(copy.deepcopy(model), cut)
    for one in result:
        model.get_submodule(one.name).register_forward_hook(silenced)
    expected = model(x)
    torch.testing.assert_close(small(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(small))(x), expected, rtol=0, atol=0)
    assert Cut.from_json(cut.as_json()) == cut
    gone = {name for name, _ in model.named_parameters() if any(b.holds(name) for b in result)}
    left = {cut.old(name) for name, _ in small.named_parameters()}
    assert left == {name for name, _ in model.named_parameters()} - gone


def test_names() -> None:
    model = Transformer(4).eval()
    result = found(model, Example((torch.randn(2, 64),))).found
    cut = plan_cut(
        model, [one for one in result if one.name.startswith(("blocks.0", "blocks.2"))], True
    )
    assert cut.dropped == (("blocks", (0, 2)),)
    small = cut_(copy.deepcopy(model), cut)
    assert [cut.old(f"blocks.{i}.attn.qkv") for i in (0, 1)] == [
        "blocks.1.attn.qkv",
        "blocks.3.attn.qkv",
    ]
    assert cut_names(small, cut)["blocks.1"] == "blocks.3"
    assert small.get_submodule("blocks.1.attn.qkv").weight.equal(  # type: ignore[union-attr]
        model.get_submodule("blocks.3.attn.qkv").weight  # type: ignore[arg-type]
    )


def test_a_damaged_cut_is_none() -> None:
    model = Transformer(1).eval()
    entry = plan_cut(model, found(model, Example((torch.randn(2, 64),))).found, False).as_json()
    entry["modules"][0]["takes"] = ["x): import os"]
    with pytest.raises(ValueError, match="contradicts"):
        Cut.from_json(entry)


def test_layers_know_their_places_in_the_cache() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=4)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = Example(kwargs={"input_ids": torch.randint(32, (2, 5))})
    result = found(model, ids).found
    assert len(result) == 8
    gone = ("model.layers.0.self_attn.o_proj", "model.layers.2.")
    cut = plan_cut(model, [one for one in result if one.name.startswith(gone)], True)
    small: Any = cut_(copy.deepcopy(model), cut)
    assert small.config.num_hidden_layers == 3
    assert model.config.num_hidden_layers == 4
    places = [getattr(layer.self_attn, "layer_idx", None) for layer in small.model.layers]
    assert places == [None, 0, 1]
    assert values_of(ids.call(small))


def decoder(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        **({"intermediate_size": 24} if kind == "GPTNeoX" else {}),
    )
    model = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, model)(config).double().eval()


@pytest.mark.parametrize(
    ("kind", "blocks", "hosts"),
    [
        ("GPT2", "transformer.h", ("attn.c_proj", "mlp.c_proj")),  # layers that are no Linears
        ("GPTNeoX", "gpt_neox.layers", ("attention.dense", "mlp.dense_4h_to_h")),  # in parallel
    ],
)
def test_decoders_of_other_forms(kind: str, blocks: str, hosts: tuple[str, str]) -> None:
    torch.manual_seed(0)
    model, ids = decoder(kind), Example(kwargs={"input_ids": torch.randint(32, (2, 5))})
    result = found(model, ids).found
    names = [f"{blocks}.{block}.{host}" for block in (0, 1) for host in hosts]
    assert sorted(one.name for one in result) == sorted(names)
    for gone in (names[1:2], names[2:]):
        cut = plan_cut(model, [one for one in result if one.name in gone], True)
        small = cut_(copy.deepcopy(model), cut)
        assert len(small.get_submodule(blocks)._modules) == 3 - len(gone)
        silent = copy.deepcopy(model)
        for name in gone:
            silent.get_submodule(name).register_forward_hook(lambda *given: given[2] * 0)
        with torch.no_grad():
            pairs = zip(values_of(ids.call(small)), values_of(ids.call(silent)), strict=False)
            one, other = next(iter(pairs))
        torch.testing.assert_close(one, other)


def test_attentions_beside_other_layers_with_a_cache_stay() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, num_hidden_layers=2)
    model = transformers.LlamaForCausalLM(config).eval()
    ids = Example(kwargs={"input_ids": torch.randint(32, (2, 5)), "use_cache": False})
    for kinds, number in ((["sliding_attention", "full_attention"], 4), (["mamba", "mamba2"], 2)):
        config.layer_types = kinds
        result = found(model, ids)
        assert len(result.found) == number
    assert [one.name for one in result.found] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert "cache" in result.refused["model.layers.0.self_attn.o_proj"]
