"""The models, from 10 M to 1 B parameters, with random weights in float32, and their budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

VOCABULARY = 8000
TOKENS = 8


@dataclass(frozen=True)
class Entry:
    """One model, an input for it, and how much time and memory it may take."""

    library: str
    """What has to be installed."""
    params: int
    build: Callable[[], nn.Module]
    example: Callable[[], Tensor]
    measure: str
    """Of the constraint: "params" or "macs"."""
    seconds: float | None = None
    """Budget of all three steps together."""
    gib: float | None = None
    """Budget of the process's memory, on top of the one that all models have."""


class Decoder(NamedTuple):
    """The sizes of a LLaMA-like decoder."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_heads: int

    @property
    def params(self) -> int:
        """Embedding and head, then each layer's attention, MLP and two norms, and the last norm."""
        keys = self.hidden * self.key_heads // self.heads
        attention = 2 * self.hidden * (self.hidden + keys)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return 2 * VOCABULARY * self.hidden + self.layers * layer + self.hidden

    def build(self) -> nn.Module:
        """The model, without a cache of keys, which evaluation would fill."""
        transformers = import_module("transformers")
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=self.hidden,
                num_hidden_layers=self.layers,
                intermediate_size=self.intermediate,
                num_attention_heads=self.heads,
                num_key_value_heads=self.key_heads,
                use_cache=False,
            )
        )


def _tokens() -> Tensor:
    return torch.randint(VOCABULARY, (1, TOKENS))


def _image() -> Tensor:
    return torch.randn(1, 3, 224, 224)


def _decoder(sizes: Decoder, **budget: float) -> Entry:
    return Entry("transformers", sizes.params, sizes.build, _tokens, "params", **budget)


def _torchvision(name: str, params: int, measure: str, **budget: float) -> Entry:
    def build() -> nn.Module:
        models: Any = import_module("torchvision.models")
        return getattr(models, name)(weights=None)

    return Entry("torchvision", params, build, _image, measure, **budget)


MODELS: dict[str, Entry] = {
    "llama/10M": _decoder(Decoder(256, 6, 1024, 4, 2)),
    "llama/30M": _decoder(Decoder(384, 12, 1536, 6, 2)),
    "llama/100M": _decoder(Decoder(768, 12, 2560, 12, 4)),
    "llama/400M": _decoder(Decoder(1024, 24, 4096, 16, 8)),
    "llama/1B": _decoder(Decoder(2048, 16, 8192, 32, 8), seconds=180.0, gib=16.0),
    "torchvision/resnet18": _torchvision("resnet18", 11_689_512, "macs"),
    "torchvision/resnet50": _torchvision("resnet50", 25_557_032, "macs", seconds=8.0),
    "torchvision/vit_b_16": _torchvision("vit_b_16", 86_567_656, "params"),
}


def select(names: Sequence[str], max_params: float) -> list[str]:
    """The models that are asked for (all where none is), up to a size, in the table's order.

    Raises:
        ValueError: a name that is neither a model nor the first part of one.
    """

    def fits(model: str, name: str) -> bool:
        return model == name or model.startswith(f"{name}/")

    for name in names:
        if not any(fits(model, name) for model in MODELS):
            raise ValueError(f"--models: got {name!r}; expected one of {', '.join(MODELS)}")
    return [
        model
        for model, entry in MODELS.items()
        if entry.params <= max_params and (not names or any(fits(model, name) for name in names))
    ]
