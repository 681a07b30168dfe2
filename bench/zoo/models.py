"""The models of the zoo, by family: torchvision's, timm's and Hugging Face's, with random weights.

Where a library offers a small member of a family it is taken as it is; where not, one is built from
its own configuration. Images are small: pruning does not depend on their size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.calls import Example as Call
from l0fast.pruning.precision import float64_for_float32, widened

Example = Callable[[], tuple[Any, ...] | dict[str, Any]]
"""Draws an input: positional arguments, or keyword arguments."""


@dataclass(frozen=True)
class Entry:
    """One model, and how to draw an input for it."""

    library: str
    """What has to be installed, for example "timm"."""
    build: Callable[[], nn.Module]
    example: Example


def images(size: int, batch: int = 2, channels: int = 3) -> Example:
    return lambda: (torch.randn(batch, channels, size, size),)


VOCABULARY = 101


def _tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 16))


def tokens() -> tuple[Tensor]:
    """Of a language model, as its only argument."""
    return (_tokens(),)


def masked_tokens() -> tuple[Tensor, Tensor]:
    """With an attention mask, of which the second row's last quarter is padding."""
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 12:] = 0
    return _tokens(), mask


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(import_module("torchvision.models"), name)(weights=None, **options)

    return build


def _vgg(name: str) -> Callable[[], nn.Module]:
    """With 512 hidden units in the classifier in place of 4096, which are 90 % of its weights."""

    def build() -> nn.Module:
        model = _torchvision(name)()
        model.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 512), nn.ReLU(True), nn.Dropout(),
            nn.Linear(512, 512), nn.ReLU(True), nn.Dropout(), nn.Linear(512, 1000),
        )  # fmt: skip
        return model

    return build


def _vit() -> nn.Module:
    vision = import_module("torchvision.models.vision_transformer").VisionTransformer
    return vision(
        image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512
    )


def _maxvit() -> nn.Module:
    return import_module("torchvision.models.maxvit").MaxVit(
        input_size=(64, 64),
        stem_channels=32,
        partition_size=2,
        block_channels=[32, 64, 128],
        block_layers=[1, 1, 1],
        head_dim=16,
        stochastic_depth_prob=0.0,
    )


def _timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: import_module("timm").create_model(name, pretrained=False, **options)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
"""The names that most configurations share."""


def _hugging_face(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = import_module("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return build


def _decoder(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return _hugging_face(model, config, use_cache=False, **ends, **options)


VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}

_TORCHVISION: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "alexnet": (_torchvision("alexnet"), images(64)),
    "vgg11 (512 hidden)": (_vgg("vgg11"), images(32)),
    "vgg11_bn (512 hidden)": (_vgg("vgg11_bn"), images(32)),
    "resnet18": (_torchvision("resnet18"), images(64)),
    "resnet50": (_torchvision("resnet50"), images(64)),
    "wide_resnet50_2": (_torchvision("wide_resnet50_2"), images(64)),
    "resnext50_32x4d": (_torchvision("resnext50_32x4d"), images(64)),
    "regnet_x_400mf": (_torchvision("regnet_x_400mf"), images(64)),
    "regnet_y_400mf": (_torchvision("regnet_y_400mf"), images(64)),
    "mobilenet_v2": (_torchvision("mobilenet_v2"), images(64)),
    "mobilenet_v3_small": (_torchvision("mobilenet_v3_small"), images(64)),
    "efficientnet_b0": (_torchvision("efficientnet_b0"), images(64)),
    "efficientnet_v2_s": (_torchvision("efficientnet_v2_s"), images(64)),
    "mnasnet0_5": (_torchvision("mnasnet0_5"), images(64)),
    "densenet121": (_torchvision("densenet121"), images(64)),
    "squeezenet1_1": (_torchvision("squeezenet1_1"), images(64)),
    "googlenet": (_torchvision("googlenet", aux_logits=False, init_weights=False), images(64)),
    "inception_v3": (
        _torchvision("inception_v3", aux_logits=False, init_weights=False),
        images(96),
    ),
    "shufflenet_v2_x0_5": (_torchvision("shufflenet_v2_x0_5"), images(64)),
    "convnext_tiny": (_torchvision("convnext_tiny"), images(64)),
    "vit (4 blocks, 128)": (_vit, images(32)),
    "swin_t": (_torchvision("swin_t"), images(64)),
    "swin_v2_t": (_torchvision("swin_v2_t"), images(64)),
    "maxvit (32-64-128)": (_maxvit, images(64)),
}

_TIMM: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "resnet10t": (_timm("resnet10t"), images(64)),
    "seresnext26d_32x4d": (_timm("seresnext26d_32x4d"), images(64)),
    "convnextv2_atto": (_timm("convnextv2_atto"), images(64)),
    "vit_tiny_patch16": (_timm("vit_tiny_patch16_224", img_size=64), images(64)),
    "deit_tiny_distilled": (_timm("deit_tiny_distilled_patch16_224", img_size=64), images(64)),
    "eva02_tiny (SwiGLU, rotary)": (_timm("eva02_tiny_patch14_224", img_size=56), images(56)),
    "mixer_s32": (_timm("mixer_s32_224", img_size=64), images(64)),
    "swin_s3_tiny": (_timm("swin_s3_tiny_224", img_size=224), images(224, batch=1)),
    "mobilenetv4_conv_small": (_timm("mobilenetv4_conv_small"), images(64)),
    "ghostnet_050": (_timm("ghostnet_050"), images(64)),
    "regnety_002": (_timm("regnety_002"), images(64)),
    "efficientformer_l1": (_timm("efficientformer_l1"), images(224, batch=1)),
    "repvgg_a0": (_timm("repvgg_a0"), images(64)),
}

_HUGGING_FACE: dict[str, tuple[Callable[[], nn.Module], Example]] = {
    "BERT": (
        _hugging_face("BertForSequenceClassification", "BertConfig", **SIZES),
        masked_tokens,
    ),
    "DistilBERT": (
        _hugging_face(
            "DistilBertForSequenceClassification", "DistilBertConfig",
            vocab_size=VOCABULARY, dim=128, hidden_dim=256, n_layers=2, n_heads=8,
        ),
        masked_tokens,
    ),
    "RoBERTa": (_hugging_face("RobertaForMaskedLM", "RobertaConfig", **SIZES), masked_tokens),
    "GPT-2": (
        _decoder(
            "GPT2LMHeadModel", "GPT2Config",
            vocab_size=VOCABULARY, n_positions=64, n_embd=128, n_layer=2, n_head=8,
        ),
        tokens,
    ),
    "OPT": (
        _decoder(
            "OPTForCausalLM", "OPTConfig",
            vocab_size=VOCABULARY, hidden_size=128, ffn_dim=256, num_hidden_layers=2,
            num_attention_heads=8, max_position_embeddings=64, word_embed_proj_dim=128,
        ),
        tokens,
    ),
    "GPT-NeoX": (_decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", **SIZES), tokens),
    "LLaMA (GQA)": (
        _decoder("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=4, **SIZES),
        tokens,
    ),
    "Mistral (GQA, window)": (
        _decoder(
            "MistralForCausalLM", "MistralConfig", num_key_value_heads=4, sliding_window=8, **SIZES
        ),
        tokens,
    ),
    "Qwen2 (GQA)": (
        _decoder("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=4, **SIZES),
        tokens,
    ),
    "Phi": (_decoder("PhiForCausalLM", "PhiConfig", **SIZES), tokens),
    "T5 encoder": (
        _hugging_face(
            "T5EncoderModel", "T5Config",
            vocab_size=VOCABULARY, d_model=128, d_kv=16, d_ff=256, num_layers=2, num_heads=8,
        ),
        masked_tokens,
    ),
    "ViT": (
        _hugging_face("ViTForImageClassification", "ViTConfig", **VISION),
        images(32),
    ),
    "CLIP vision": (_hugging_face("CLIPVisionModel", "CLIPVisionConfig", **VISION), images(32)),
    "Whisper encoder": (
        lambda: _hugging_face(
            "WhisperModel", "WhisperConfig",
            vocab_size=VOCABULARY, num_mel_bins=16, d_model=128, encoder_layers=2,
            decoder_layers=1, encoder_attention_heads=8, encoder_ffn_dim=256,
            decoder_attention_heads=8,
            max_source_positions=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            decoder_start_token_id=1,
        )().get_submodule("encoder"),
        lambda: (torch.randn(2, 16, 64),),
    ),
}  # fmt: skip

ZOO: dict[str, Entry] = {
    f"{library}/{name}": Entry(library, build, example)
    for library, models in (
        ("torchvision", _TORCHVISION),
        ("timm", _TIMM),
        ("transformers", _HUGGING_FACE),
    )
    for name, (build, example) in models.items()
}
"""Library/model -> its entry, in the order of the table."""


def to_compare(
    dense: nn.Module, example: Call
) -> tuple[nn.Module, Any, Callable[[], AbstractContextManager[None]]]:
    """A copy in float64, what it takes, and what it runs in; of a model whose forward makes tensors
    of float32 a copy as it is, which runs in float64 in that context."""
    wide = widened(example, torch.float64)
    model = copy.deepcopy(dense).double()
    try:
        with torch.no_grad():
            wide.call(model)
    except Exception:  # each model raises another error
        return copy.deepcopy(dense), example.args or dict(example.kwargs), float64_for_float32
    return model, wide.args or dict(wide.kwargs), nullcontext
