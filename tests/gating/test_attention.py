"""PyTorch's fused attention made ordinary: the same function, and heads that can go."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import load_pruned, prune, save_pruned, sparsify_
from l0fast.gating.attention import Unfused, attention_calls, unfuse_, unfused_in
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from tests.helpers.gated import snapshot
from tests.helpers.thinned import telling, thinned

WIDTH, HEADS, LENGTH = 12, 3, 5


class Self(nn.Module):
    """Self-attention, called in one way."""

    def __init__(self, keep: bool = False, options: Any = None, **how: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, **how)
        self.keep, self.options = keep, options or {}

    def forward(self, x: Tensor) -> Any:
        y, weights = self.attention(x, x, x, **self.options)
        return (y, weights) if self.keep else y


def masks(kind: str, *shape: int) -> Tensor | None:
    if kind == "float":
        return torch.randn(*shape, dtype=torch.float64)
    mask = torch.rand(*shape) > 0.7
    mask[..., 0] = False
    return mask if kind else None


CALLS = [
    *itertools.product((True, False), (True, False), (0.0,), ("", "bool", "float"), ("", "bool")),
    (True, True, 0.3, "bool", "bool"),
    (True, False, 0.3, "", ""),
]


@pytest.mark.parametrize(("batch_first", "weights", "dropout", "attn", "padding"), CALLS)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_it_computes_what_the_fused_one_does(
    batch_first: bool, weights: bool, dropout: float, attn: str, padding: str, batched: bool
) -> None:
    torch.manual_seed(0)
    shape = ((2, LENGTH) if batch_first else (LENGTH, 2)) if batched else (LENGTH,)
    options = {
        "attn_mask": masks(attn, LENGTH, LENGTH),
        "key_padding_mask": masks(padding, *((2, LENGTH) if batched else (LENGTH,))),
        "need_weights": weights,
    }
    model = Self(True, options, batch_first=batch_first, dropout=dropout).double().eval()
    nn.init.normal_(model.attention.in_proj_bias)
    nn.init.normal_(model.attention.out_proj.bias)
    x = torch.randn(*shape, WIDTH, dtype=torch.float64)
    calls = attention_calls(model, Example.of(x))
    again = unfuse_(copy.deepcopy(model), calls)  # type: ignore[arg-type]
    assert unfused_in(again) == list(calls.values())
    for got, expected in zip(again(x), model(x), strict=True):
        if expected is None:
            assert got is None
        else:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_parameters_are_the_same_and_train() -> None:
    model = Self(options={"need_weights": False}, batch_first=True)
    before = {id(parameter) for parameter in model.parameters()}
    x = torch.randn(2, LENGTH, WIDTH)
    sparsify_(model, example_inputs=x)
    gates = {id(layer.log_alpha) for layer in gated_layers(model).values()}
    assert {id(parameter) for parameter in model.parameters()} - gates == before
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_attention_dropout_is_active_in_training_alone() -> None:
    model = Self(dropout=0.5, batch_first=True)
    x = torch.randn(2, LENGTH, WIDTH)
    again: Any = unfuse_(model, attention_calls(model.eval(), Example.of(x)))  # type: ignore[arg-type]
    assert torch.equal(again(x), again(x))
    again.train()
    assert not torch.equal(again(x), again(x))


def closed(model: nn.Module, heads: list[int]) -> nn.Module:
    """Closes some heads of every attention, and leaves all else open."""
    with torch.no_grad():
        for name, layer in gated_layers(model).items():
            layer.log_alpha.fill_(9.0)
            if name.endswith("out_proj"):
                layer.log_alpha[heads] = -9.0
    return model.eval()


class Encoder(nn.Module):
    """PyTorch's own, whose layers fuse all that they hold where they can."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 20, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("padded", thinned([True, False], 2))
def test_heads_of_an_encoder_go(padded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = Encoder().double().eval()
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    args = (x, padding) if padded else (x,)
    before = model(*args)
    sparsify_(model, example_inputs=args, density_init=1.0)
    with torch.no_grad():  # where PyTorch would take its fused forward
        torch.testing.assert_close(model(*args), before, rtol=1e-12, atol=1e-12)
    closed(model, [0, 2, 3])
    small: Any = prune(model, args)
    assert small.report.tier == "merged"
    assert small.report.notes == []
    for layer in small.encoder.layers:
        attention = layer.self_attn
        assert attention.in_proj.out_features == 3 * WIDTH // 4
        assert attention.out_proj.in_features == WIDTH // 4
        assert type(attention.in_proj) is type(attention.out_proj) is nn.Linear
    for twin in (small, pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        with torch.no_grad():
            torch.testing.assert_close(twin(*args), model(*args), rtol=1e-10, atol=1e-12)
    copied = copy.deepcopy(pickle.loads(pickle.dumps(small)))
    assert torch.equal(copied(*args), small(*args))
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(lambda: Encoder().eval(), tmp_path / "small.safetensors")
    torch.testing.assert_close(again(*args), small(*args), rtol=1e-12, atol=1e-12)
    assert again.report == small.report
    with pytest.raises(ValueError, match=r"'encoder\.layers\.0\.self_attn' is a MultiheadAtt"):
        load_pruned(lambda: again, tmp_path / "small.safetensors")


@pytest.mark.parametrize("how", telling(["compile", "export"], ["compile"]))
def test_a_pruned_one_compiles_and_exports(how: str) -> None:
    model = Self(options={"need_weights": False}, batch_first=True).eval()
    x = torch.randn(2, LENGTH, WIDTH)
    small = prune(closed(sparsify_(model, example_inputs=x), [1]), x)
    if how == "compile":
        made: Any = torch.compile(small, fullgraph=True, backend="aot_eager")
    else:
        made = torch.export.export(small, (x,)).module()
    torch.testing.assert_close(made(x), small(x))


def test_a_head_whose_weights_are_given_out_stays() -> None:
    model: Any = Self(keep=True, batch_first=True).double().eval()
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    table = sparsify_(model, example_inputs=x, dry_run=True)
    reason = {row.name: row.reason for row in table.layers}["attention.out_proj"]
    assert "aten::mean" in reason


@pytest.mark.parametrize("where", telling(["gated", "pruned", "pickled"], ["gated", "pickled"]))
def test_another_call_than_the_examples_is_refused(where: str) -> None:
    def refused(expected: str, options: dict[str, Any], other: dict[str, Any]) -> None:
        model: Any = Self(options=options, batch_first=True).eval()
        x = torch.randn(2, LENGTH, WIDTH)
        sparsify_(model, example_inputs=x)
        if where != "gated":
            model = prune(closed(model, [1]), x)
        if where == "pickled":
            model = pickle.loads(pickle.dumps(model))
        model(x)
        model.options = options | other
        with pytest.raises(RuntimeError, match=f"^{expected}, as in the example"):
            model(x)

    floats = torch.zeros(LENGTH, LENGTH)
    plain = {"need_weights": False}
    masked = {"bool": plain | {"attn_mask": floats.bool()}, "float": plain | {"attn_mask": floats}}
    refused("need_weights: got True; expected False", plain, {"need_weights": True})
    refused("attn_mask: got a mask; expected None", plain, {"attn_mask": floats})
    for kind, other in (("bool", "float"), ("float", "bool")):
        expected = f"expected a {kind} mask"
        refused(f"attn_mask: got None; {expected}", masked[kind], {"attn_mask": None})
        # PyTorch's own attentions take them for opposites.
        refused(f"attn_mask: got a {other} mask; {expected}", masked[kind], masked[other])


class Cross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attention(x, x + 1, x)[0])


class Twice(Cross):
    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(x, x, x)[0]
        return self.mlp(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("build", "how", "reason"),
    [
        (Cross, {}, "its queries, keys and values are not one tensor"),
        (Twice, {}, "it is called in two ways"),
        (Self, {"add_zero_attn": True}, "it has kdim, vdim, add_bias_kv or add_zero_attn"),
        (Self, {"add_bias_kv": True}, "it has kdim, vdim, add_bias_kv or add_zero_attn"),
        (
            Self,
            {"options": {"attn_mask": torch.zeros(2 * HEADS, LENGTH, LENGTH)}},
            "its mask is not the same for all heads",
        ),
    ],
)
def test_what_stays_fused_says_why(build: Any, how: Any, reason: str) -> None:
    model, x = build(**how, **({"batch_first": True} if build is Self else {})), None
    x = torch.randn(2, LENGTH, WIDTH)
    before = snapshot(model)
    table = sparsify_(model, example_inputs=x, dry_run=True)
    assert {row.name: row.reason for row in table.layers}["attention"] == reason
    assert reason in str(table)
    assert snapshot(model) == before


def test_a_fused_one_without_gates_in_it_stays_as_it_was() -> None:
    model: Any = Encoder()
    x = torch.randn(2, LENGTH, WIDTH)
    sparsify_(model, example_inputs=x, exclude=lambda name, _: "self_attn" in name)
    # A layer that fuses what it holds must not: its MLP has gates.
    assert list(gated_layers(model)) == ["encoder.layers.0.linear2", "encoder.layers.1.linear2"]
    assert not isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention)
    model = Encoder()
    sparsify_(model, gates="weight", include="head", example_inputs=x)
    assert isinstance(model.encoder.layers[0].self_attn, nn.MultiheadAttention)


def test_a_model_that_is_the_attention_itself_stays_fused() -> None:
    model = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    x = torch.randn(2, LENGTH, WIDTH)
    table = sparsify_(model, example_inputs=(x, x, x), dry_run=True)
    assert "it is the model itself" in str(table)
    with pytest.raises(ValueError, match="expected a model with a Linear or conv layer to gate"):
        sparsify_(model, example_inputs=(x, x, x))


def test_a_part_that_was_given_gates_is_pruned_and_loaded_in_the_whole(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), Self(batch_first=True)).eval()

    whole: Any = build()
    x = torch.randn(2, LENGTH, WIDTH)
    sparsify_(whole[1], example_inputs=x)
    small: Any = prune(closed(whole, [1]), x)
    assert [entry["name"] for entry in small.report.attention] == ["1.attention"]
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(build, tmp_path / "small.safetensors")
    torch.testing.assert_close(again(x), small(x))


def test_an_entry_that_is_none_is_refused() -> None:
    entry = {
        "name": "a", "embed_dim": 12, "num_heads": 3, "batch_first": True, "batched": True,
        "need_weights": False, "average_attn_weights": True, "attn_mask": "",
        "key_padding_mask": "",
    }  # fmt: skip
    assert Unfused.from_json(entry).as_json() == entry
    with pytest.raises(ValueError, match="contradicts"):
        Unfused.from_json(entry | {"num_heads": "3"})
    with pytest.raises(TypeError, match="more"):
        Unfused.from_json(entry | {"more": 1})
