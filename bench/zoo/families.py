"""The families of Hugging Face whose every axis is tried: tiny models of their own configurations.

Each has three layers, so that a layer in the middle can go. Decoders keep their cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.zoo.models import VOCABULARY, Entry
from bench.zoo.small import of_transformers

LAYERS = 3
SIDE, MELS, FRAMES = 32, 16, 64
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
DECODER = {"use_cache": True, "eos_token_id": None}
OPENAI = {"n_embd": 64, "n_layer": LAYERS, "n_head": 4}
MIXTURE = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
"""Of the ways in which transformers computes experts, one that torch.export and float64 take."""


@dataclass(frozen=True)
class Family:
    """One family: its model, and what it takes."""

    config: str
    """The class of its configuration."""
    model: str
    options: dict[str, Any]
    takes: str = "tokens"
    """"tokens", "masked tokens", "image", "sound", or "two texts" (an encoder and a decoder)."""

    def entry(self) -> Entry:
        """The model, and a small batch of what it takes."""
        build = of_transformers(self.config, self.model, **(self._sizes() | self.options)).build
        return Entry("transformers", build, lambda: self.batch(2, 12))

    def _sizes(self) -> dict[str, Any]:
        """`SIZES`, of the names that its configuration has."""
        kind: Any = getattr(import_module("transformers"), self.config)
        known = {*kind().to_dict(), *kind.attribute_map}
        return {name: size for name, size in SIZES.items() if name in known}

    def batch(self, rows: int, length: int) -> dict[str, Tensor]:
        """Fresh inputs of that many rows; of texts also of that length."""
        return TAKES[self.takes](rows, length)

    @property
    def generates(self) -> bool:
        return self.takes in ("tokens", "sound", "two texts")


def _tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, VOCABULARY, (rows, length))


def _masked(rows: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[-1, 3 * length // 4 :] = 0
    return {"input_ids": _tokens(rows, length), "attention_mask": mask}


def _sound(rows: int, length: int) -> dict[str, Tensor]:
    sound = torch.randn(rows, MELS, FRAMES)
    return {"input_features": sound, "decoder_input_ids": _tokens(rows, length)}


TAKES: dict[str, Callable[[int, int], dict[str, Tensor]]] = {
    "tokens": lambda rows, length: {"input_ids": _tokens(rows, length)},
    "masked tokens": _masked,
    "image": lambda rows, _: {"pixel_values": torch.randn(rows, 3, SIDE, SIDE)},
    "sound": _sound,
    "two texts": lambda rows, length: (
        _masked(rows, length) | {"decoder_input_ids": _tokens(rows, length - 1)}
    ),
}


def _encoder(config: str, model: str, **options: Any) -> Family:
    return Family(config, model, options, "masked tokens")


def _decoder(config: str, model: str, **options: Any) -> Family:
    return Family(config, model, DECODER | options)


def _vision(config: str, model: str, **options: Any) -> Family:
    return Family(config, model, options, "image")


FAMILIES: dict[str, Family] = {
    "BERT": _encoder("BertConfig", "BertForSequenceClassification"),
    "DistilBERT": _encoder(
        "DistilBertConfig", "DistilBertForSequenceClassification",
        dim=64, hidden_dim=96, n_layers=LAYERS, n_heads=4,
    ),
    "RoBERTa": _encoder("RobertaConfig", "RobertaForMaskedLM"),
    "ALBERT": _encoder("AlbertConfig", "AlbertForMaskedLM"),
    "DeBERTa-v2": _encoder(
        "DebertaV2Config", "DebertaV2ForMaskedLM",
        relative_attention=True, pos_att_type=["p2c", "c2p"],
    ),
    "ModernBERT": _encoder("ModernBertConfig", "ModernBertForMaskedLM"),
    "GPT-2": _decoder("GPT2Config", "GPT2LMHeadModel", **OPENAI),
    "OPT": _decoder("OPTConfig", "OPTForCausalLM", ffn_dim=96, word_embed_proj_dim=64),
    "BLOOM": _decoder("BloomConfig", "BloomForCausalLM", n_layer=LAYERS, n_head=4),
    "GPT-NeoX": _decoder("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "Falcon": _decoder("FalconConfig", "FalconForCausalLM"),
    "Falcon (new)": _decoder(
        "FalconConfig", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2
    ),
    "Phi": _decoder("PhiConfig", "PhiForCausalLM"),
    "StableLM": _decoder("StableLmConfig", "StableLmForCausalLM"),
    "Cohere": _decoder("CohereConfig", "CohereForCausalLM"),
    "LLaMA": _decoder("LlamaConfig", "LlamaForCausalLM"),
    "Mistral": _decoder("MistralConfig", "MistralForCausalLM", sliding_window=8),
    "Qwen2": _decoder("Qwen2Config", "Qwen2ForCausalLM"),
    "Qwen3": _decoder("Qwen3Config", "Qwen3ForCausalLM"),
    "Phi-3": _decoder("Phi3Config", "Phi3ForCausalLM"),
    "Gemma 2": _decoder("Gemma2Config", "Gemma2ForCausalLM", sliding_window=8),
    "Gemma 3": _decoder("Gemma3TextConfig", "Gemma3ForCausalLM", sliding_window=8),
    "OLMo 2": _decoder("Olmo2Config", "Olmo2ForCausalLM"),
    "Mixtral": _decoder(
        "MixtralConfig", "MixtralForCausalLM", num_local_experts=8, **MIXTURE
    ),
    "Qwen2-MoE": _decoder(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", num_experts=8, moe_intermediate_size=32,
        shared_expert_intermediate_size=48, **MIXTURE,
    ),
    "T5": Family(
        "T5Config", "T5ForConditionalGeneration",
        DECODER | {"d_kv": 16, "d_ff": 96, "num_decoder_layers": LAYERS},
        "two texts",
    ),
    "Whisper": Family(
        "WhisperConfig", "WhisperForConditionalGeneration",
        DECODER | {
            "d_model": 64, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96, "num_mel_bins": MELS, "max_source_positions": FRAMES // 2,
        },
        "sound",
    ),
    "ViT": _vision("ViTConfig", "ViTForImageClassification"),
    "CLIP vision": _vision("CLIPVisionConfig", "CLIPVisionModel"),
    "DINOv2": _vision("Dinov2Config", "Dinov2ForImageClassification"),
    "DINOv2 (SwiGLU)": _vision(
        "Dinov2Config", "Dinov2ForImageClassification", use_swiglu_ffn=True
    ),
    "Swin": _vision(
        "SwinConfig", "SwinForImageClassification", num_attention_heads=[2, 4], num_hidden_layers=2,
        hidden_size=64, embed_dim=32, depths=[2, 3], num_heads=[2, 4], window_size=4,
        patch_size=4,
    ),
}  # fmt: skip
"""Name of a family -> its tiny model, in the order of the table."""
