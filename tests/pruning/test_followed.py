"""Ops between two layers through which closed units are followed, and smaller on both sides."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import L0Conv2d, L0Linear, load_pruned, prune, save_pruned, sparsify_
from l0fast.layers.handle import gated_layers
from tests.helpers.half_closed import assert_merged, assert_same, half_closed
from tests.helpers.plain_models import mlp
from tests.helpers.thinned import telling


class Linears(nn.Module):
    """Two Linears with something between."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class LoRA(nn.Module):
    """A branch of low rank in float32 beside a layer of another dtype, as peft writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.base = mlp(4, 6), nn.Linear(6, 5)
        self.lora_a, self.lora_b = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.base(x)
        lora = self.lora_b(self.lora_a(x.to(self.lora_a.weight.dtype)))
        return y + (lora * 0.5).to(y.dtype)


def pruned(model: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """What prune makes of the model with half of its gates closed, without a gather; the model."""
    torch.manual_seed(0)
    model = half_closed(model, x, exclude=lambda name, _: name in ("a", "first.0"))
    small: Any = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    return small, model


DTYPES: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x.float().double(),
    "to": lambda x: x.relu().to(x.dtype),
    "to and back": lambda x: x.to(torch.float32).exp().to(x.dtype),
}


@pytest.mark.parametrize("name", DTYPES)
def test_another_dtype_between_layers(name: str) -> None:
    small, _ = pruned(Linears(DTYPES[name]), torch.randn(2, 4, dtype=torch.float64))
    assert small.a.out_features == small.b.in_features == 3


def test_a_branch_in_another_dtype() -> None:
    small, _ = pruned(LoRA(), torch.randn(2, 4, dtype=torch.float64))
    assert small.first[0].out_features == 3
    assert small.base.in_features == small.lora_a.in_features == 3
    assert small.lora_a.out_features == small.lora_b.in_features == 1


class Logits(nn.Module):
    """A language model of transformers as a function of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits


DECODERS = {
    # Options, and whether heads can go: not if a norm goes over all of them.
    "Llama": ({"attn_implementation": "eager"}, True),
    "Qwen3": ({"head_dim": 8}, True),
    "Gemma2": ({"head_dim": 8}, True),
    "Gemma3": ({"head_dim": 8}, True),
    "Olmo2": ({}, False),
}


@pytest.mark.parametrize("kind", telling(DECODERS, ["Gemma2", "Olmo2"]))
def test_heads_of_decoders(kind: str) -> None:
    """RMS norms in Python, over the numbers of a head, leave heads apart."""
    transformers = pytest.importorskip("transformers")
    options, apart = DECODERS[kind]
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        use_cache=False,
        **options,
    )
    torch.manual_seed(0)
    model = Logits(getattr(transformers, f"{kind}ForCausalLM")(config))
    tokens = torch.randint(1, 23, (2, 5))
    small, model = pruned(model, tokens)
    block = small.model.model.layers[0]
    assert block.mlp.down_proj.in_features == block.mlp.up_proj.out_features == 6
    gates = {name.rpartition(".")[2]: layer for name, layer in gated_layers(model).items()}
    assert ("o_proj" in gates) == apart
    width = model.model.model.layers[0].self_attn.o_proj.in_features
    assert gates["o_proj"].num_gates == 2 if apart else True  # of two heads each, with a key
    assert block.self_attn.o_proj.in_features == (width // 2 if apart else width)
    assert block.self_attn.k_proj.out_features == (width // 4 if apart else width // 2)


class Convs(nn.Module):
    """Two convolutions with something between."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 8, reads: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(reads, 2, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def spread(x: Tensor) -> Tensor:
    """Each row's neighbours are added up, as a layer of a graph network does."""
    rows = torch.tensor([0, 0, 1, 2, 3, 3]).view(1, 1, 6, 1).expand_as(x)
    return torch.zeros_like(x).scatter_add(2, rows, x)


BETWEEN: dict[str, tuple[nn.Module, int]] = {
    # The model, and what is left of the 8 channels of the layer before.
    "glu": (Convs(lambda x: F.glu(x, 1), reads=4), 4),
    "pixel_shuffle": (Convs(lambda x: F.pixel_shuffle(x, 2), reads=2), 4),
    "pixel_unshuffle": (Convs(lambda x: F.pixel_unshuffle(x, 2).relu(), reads=32), 4),
    "unfolded and folded": (
        Convs(lambda x: F.fold(F.unfold(x, 3, padding=1).tanh(), (6, 6), 3, padding=1)),
        4,
    ),
    "bicubic": (Convs(lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic")), 4),
    "one slope": (Convs(nn.PReLU()), 4),
    "shifted": (Convs(lambda x: x.roll((1, 2), (2, 3)).flip(-1)), 4),
    "logarithm": (Convs(lambda x: x.square().log1p()), 4),
    "indices": (Convs(lambda x: x[:, :, torch.tensor([0, 2, 1, 4])]), 4),
    "neighbours": (Convs(spread), 4),
    "running sum": (Convs(lambda x: x.cumsum(2)), 4),
    "along rows": (Convs(lambda x: F.normalize(x, dim=3)), 4),
    "over channels": (Convs(F.normalize), 8),
    "rolled channels": (Convs(lambda x: x.roll(1, 1)), 8),
    "some channels": (Convs(lambda x: x[:, torch.tensor([0, 2, 1, 4, 7, 6, 5, 3])]), 8),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_ops_between_convolutions(name: str) -> None:
    model, width = BETWEEN[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = half_closed(model, x) if width < 8 else model.double()
    if width == 8:  # no gates on what can only vanish as a whole
        table = sparsify_(model, example_inputs=x, dry_run=True)
        assert [row.gates for row in table.layers if row.name == "b"] == [""]
        return
    small: Any = prune(model, x)
    assert_merged(small)
    assert_same(small, model, x)
    assert small.a.out_channels == width
    assert small.b.in_channels == model.get_parameter("b.weight").shape[1] // 2


def test_a_tensor_written_out_in_a_forward_leaves_zeros_known() -> None:
    """`torch.tensor(...)` detaches in place: it writes over no unit."""
    model = Convs(lambda x: x.relu() * torch.tensor(2.0, dtype=x.dtype))
    table = sparsify_(model, example_inputs=torch.randn(1, 3, 6, 6), dry_run=True)
    assert {row.name: row.gates for row in table.layers} == {"a": "output", "b": ""}


class Simple(nn.Conv2d):
    """A convolution with another __init__, as torchvision's Conv3DSimple."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)
        self.made_by = "Simple"

    def extra_repr(self) -> str:
        return "simple"


class Doubled(nn.Linear):
    """A Linear of another function."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Standardized(nn.Conv2d):
    """A convolution of another function, which keeps its forward."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


def simple_images() -> nn.Module:
    return nn.Sequential(
        Simple(3, 6), nn.BatchNorm2d(6), nn.ReLU(), Simple(6, 5), nn.ReLU(), nn.Flatten(),
        nn.Linear(5 * 16, 2)
    )  # fmt: skip


def test_subclasses_that_keep_the_forward_are_gated_and_pruned(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    small, model = pruned(simple_images(), x)
    assert list(gated_layers(model)) == ["3", "6"]
    assert type(small[0]) is type(small[3]) is nn.Conv2d
    assert small[0].out_channels == small[3].in_channels == 3
    save_pruned(small, tmp_path / "small.safetensors")
    again: Any = load_pruned(simple_images, tmp_path / "small.safetensors").eval()
    assert type(again[3]) is nn.Conv2d
    assert_same(again, small, x)


def test_subclasses_of_another_function_have_no_gates() -> None:
    model = nn.Sequential(Standardized(3, 6, 3), nn.ReLU(), nn.Flatten(), Doubled(24, 2))
    model.append(nn.Linear(2, 2))
    table = sparsify_(model, example_inputs=torch.randn(1, 3, 4, 4), dry_run=True)
    assert [row.name for row in table.layers] == ["4"]
    for layer, kind in ((model[0], L0Conv2d), (model[3], L0Linear)):
        with pytest.raises(TypeError, match="layer: got"):
            kind.from_dense(layer)


def test_a_subclass_is_not_made_anew() -> None:
    layer = Simple(3, 6)
    gated = L0Conv2d.from_dense(layer)
    assert gated.weight is layer.weight
    assert type(gated.dense()) is nn.Conv2d
    with pytest.raises(TypeError, match="layer: got 'L0Conv2d'"):
        L0Conv2d.from_dense(gated)
