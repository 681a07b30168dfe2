"""A small model of any name that a library knows, and an input for it.

Each library has a function that says whether it knows a name, and one that builds the model: from
the name in timm and torchvision, from a small configuration in transformers and diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from bench.zoo.models import VOCABULARY, Entry, Example, images

SIDE = 64
"""Pixels of an image, where a model takes images of that size."""
TOKENS = 16
CLASSES = 10


def _first_that_runs(library: str, tries: list[tuple[Callable[[], nn.Module], Example]]) -> Entry:
    """The first of several ways to build a model that takes its input; else the last of them."""
    for build, example in tries[:-1]:
        try:
            with torch.no_grad():
                build().eval()(*example())
        except Exception:  # each library refuses a size of image with another error
            continue
        return Entry(library, build, example)
    return Entry(library, *tries[-1])


def in_timm(name: str) -> bool:
    return bool(import_module("timm").is_model(name))


def of_timm(name: str) -> Entry:
    """With small images, if the model can be built for them, else with its own size."""
    timm = import_module("timm")

    def build(**options: Any) -> Callable[[], nn.Module]:
        return lambda: timm.create_model(name, pretrained=False, **options)

    config = timm.get_pretrained_cfg(name)
    own = config.input_size[-1] if config is not None else 224
    return _first_that_runs(
        "timm",
        [
            (build(), images(SIDE)),
            (build(img_size=SIDE), images(SIDE)),
            (build(), images(own, batch=1)),
        ],
    )


def in_torchvision(name: str) -> bool:
    return name in import_module("torchvision.models").list_models()


def of_torchvision(name: str) -> Entry:
    """By its task: classification and segmentation, detection, video, or optical flow."""
    models = import_module("torchvision.models")
    builder = models.get_model_builder(name)
    task = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    options: dict[str, Any] = {"weights": None}
    options |= {"weights_backbone": None} if task in ("detection", "segmentation") else {}
    example, own = images(SIDE), images(224, batch=1)
    if task == "detection":
        # SSD has one size of images; the others resize what they get to `min_size`.
        options |= {} if name.startswith("ssd") else {"min_size": SIDE, "max_size": SIDE}
        example = own = lambda: ([torch.rand(3, SIDE, SIDE), torch.rand(3, SIDE, SIDE)],)
    elif task == "video":
        example = lambda: (torch.randn(1, 3, 8, 32, 32),)  # noqa: E731
        own = lambda: (torch.randn(1, 3, 16, 224, 224),)  # noqa: E731
    elif task == "optical_flow":
        example = own = lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))

    def build() -> nn.Module:
        return builder(**options)

    return _first_that_runs("torchvision", [(build, example), (build, own)])


CONFIGURATION: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
    "max_position_embeddings": 64, "embedding_size": 32, "image_size": 32, "patch_size": 8,
    "d_model": 128, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 8,
    "num_decoder_layers": 2, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
    "decoder_ffn_dim": 256, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
    "n_embd": 128, "n_layer": 2, "n_head": 8, "n_positions": 64, "dim": 128, "hidden_dim": 256,
    "n_layers": 2, "n_heads": 8, "pooler_hidden_size": 128, "num_queries": 8, "d_latents": 64,
    "num_latents": 16, "num_self_attends_per_block": 2, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1, "decoder_start_token_id": 1,
    "use_cache": False, "num_labels": CLASSES,
}  # fmt: skip
"""What a small configuration of transformers has, of these names those that its class has."""

HEADS = ("MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION")
"""The tasks whose model is taken, the first that a configuration has one for; else the base."""


def _configuration(name: str) -> Any:
    """The class of a configuration, by its own name or by its model type, or None."""
    transformers = import_module("transformers")
    known = transformers.CONFIG_MAPPING
    if name in known:
        return known[name]
    found = getattr(transformers, name, None) if name.endswith("Config") else None
    return found if found in known.values() else None


def in_transformers(name: str) -> bool:
    return _configuration(name) is not None


def small_configuration(kind: Any, **options: Any) -> Any:
    """A configuration of a class with few layers and small widths, and those it consists of."""
    known = kind().to_dict()
    parts = {
        name: small_configuration(part)
        for name, part in kind.sub_configs.items()
        if part.__name__ != "AutoConfig"
    }
    sizes = {name: value for name, value in CONFIGURATION.items() if name in known}
    return kind(**(sizes | parts | options))


def of_transformers(name: str, head: str = "", **options: Any) -> Entry:
    """A model of a small configuration.

    Args:
        name: of the configuration's class, or its model type.
        head: the model's class; else by `HEADS`.
        options: what differs in the configuration.
    """
    transformers = import_module("transformers")
    kind = _configuration(name)
    config = small_configuration(kind, **options)
    mappings = [getattr(transformers, f"MODEL_FOR_{task}_MAPPING") for task in HEADS]
    mappings.append(transformers.MODEL_MAPPING)
    found = getattr(transformers, head, None) or next(
        mapping[kind] for mapping in mappings if kind in mapping
    )
    if isinstance(found, tuple):  # several models for one task
        found = found[0]
    return Entry(
        "transformers", lambda: found(small_configuration(kind, **options)), _of(found, config)
    )


def _of(model: Any, config: Any) -> Example:
    """What a model of transformers takes, by the names of its arguments."""
    takes = inspect.signature(model.forward).parameters

    def tokens() -> torch.Tensor:
        return torch.randint(2, VOCABULARY, (2, TOKENS))

    def example() -> dict[str, Any]:
        if "pixel_values" in takes and model.main_input_name == "pixel_values":
            side = getattr(config, "image_size", SIDE)
            return {"pixel_values": torch.randn(2, 3, side, side)}
        if model.main_input_name not in ("input_ids", "inputs"):
            raise ValueError(f"no input is known for {model.__name__}({model.main_input_name})")
        inputs: dict[str, Any] = {model.main_input_name: tokens()}
        if not model.__name__.endswith("CausalLM"):
            inputs["attention_mask"] = torch.ones(2, TOKENS, dtype=torch.int64)
            inputs["attention_mask"][1, 3 * TOKENS // 4 :] = 0
        if "decoder_input_ids" in takes:
            inputs["decoder_input_ids"] = tokens()
        return inputs

    return example


SIZES: dict[str, Any] = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "num_layers": 2,
    "num_attention_heads": 4, "attention_head_dim": 16, "norm_num_groups": 8,
    "cross_attention_dim": 32, "num_embeds_ada_norm": CLASSES,
}  # fmt: skip
"""What a small model of diffusers has, of these names those that its class takes."""


def in_diffusers(name: str) -> bool:
    found = getattr(import_module("diffusers"), name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)


def of_diffusers(name: str, **options: Any) -> Entry:
    """A model of small sizes, of its first and last kind of block; `options` are what differs."""
    found = getattr(import_module("diffusers"), name)
    arguments = inspect.signature(found.__init__).parameters
    sizes: dict[str, Any] = {
        name: size
        for name, size in SIZES.items()
        if name in arguments and arguments[name].default is not None
    }
    for blocks in ("down_block_types", "up_block_types"):
        if blocks in arguments:
            kinds = arguments[blocks].default
            sizes[blocks] = (kinds[0], kinds[-1])
    sizes |= options
    takes = inspect.signature(found.forward).parameters

    channels = found(**sizes).config["in_channels"]

    def example() -> dict[str, Any]:
        sample = "sample" if "sample" in takes else "hidden_states"
        inputs: dict[str, Any] = {sample: torch.randn(2, channels, SIZES["sample_size"], 16)}
        if "timestep" in takes:
            inputs["timestep"] = torch.randint(0, 1000, (2,))
        if "encoder_hidden_states" in takes:
            inputs["encoder_hidden_states"] = torch.randn(2, 8, SIZES["cross_attention_dim"])
        if "num_embeds_ada_norm" in sizes:
            inputs["class_labels"] = torch.randint(0, CLASSES, (2,))
        return inputs

    return Entry("diffusers", lambda: found(**sizes), example)
