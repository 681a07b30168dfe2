"""The held-out list: models that nobody looked at while the library's rules were written.

Most are built from their name by `small`. Those of `LISTED` are in the zoo, too.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.zoo.models import SIZES, Entry, tokens
from bench.zoo.small import of_diffusers, of_torchvision, of_transformers

LISTED = ("torchvision/swin_t", "transformers/GPT-2", "transformers/T5 encoder")

TIMM = (
    "levit_128s", "cait_xxs24_224", "pit_ti_224", "crossvit_tiny_240", "ghostnetv3_050",
    "poolformer_s12", "mambaout_femto", "res2net50_26w_4s", "cspresnet50", "ese_vovnet19b_dw",
    "hgnet_tiny", "dpn48b", "skresnet18", "rexnet_100", "focalnet_tiny_srf", "twins_svt_small",
    "pvt_v2_b0", "xcit_nano_12_p8_224", "gcvit_xxtiny", "efficientnet_b0_gn", "gmlp_s16_224",
    "gmixer_12_224",
)  # fmt: skip
TRANSFORMERS = (
    "Qwen3Config", "Gemma3TextConfig", "Olmo2Config", "Phi3Config", "ModernBertConfig",
    "AlbertConfig", "PerceiverConfig",
)  # fmt: skip
TORCHVISION = (
    "fcos_resnet50_fpn", "retinanet_resnet50_fpn", "ssdlite320_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large", "raft_small", "r3d_18",
)  # fmt: skip
DIFFUSERS = ("UNet2DModel", "AutoencoderKL", "DiTTransformer2DModel")


class Dense(nn.Module):
    """The convolutions of a detector: backbone and head, without anchors and suppression."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.get_submodule("backbone")
        self.head = detector.get_submodule("head")

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return self.head(list(self.backbone(image).values()))


def _dense(name: str) -> Entry:
    whole = of_torchvision(name)
    return Entry("torchvision", lambda: Dense(whole.build()), lambda: (torch.randn(2, 3, 64, 64),))


def _detr() -> Entry:
    """With a small ResNet of transformers as its backbone."""
    transformers = import_module("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=["stage4"],
    )  # fmt: skip
    return of_transformers(
        "DetrConfig", backbone_config=backbone, use_timm_backbone=False, backbone=None
    )


def _with_lora() -> nn.Module:
    """LLaMA with low-rank adapters beside some of its Linears, as peft puts them in."""
    transformers, peft = import_module("transformers"), import_module("peft")
    config = transformers.LlamaConfig(num_key_value_heads=4, use_cache=False, **SIZES)
    chosen = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    return peft.inject_adapter_in_model(chosen, transformers.LlamaForCausalLM(config))


class Generator(nn.Sequential):
    """DCGAN's: transposed convolutions from a vector to an image of 32 pixels."""

    def __init__(self, latent: int = 64, width: int = 32, channels: int = 3) -> None:
        layers: list[nn.Module] = []
        widths = [latent, 4 * width, 2 * width, width]
        for first, (before, after) in enumerate(pairwise(widths)):
            stride, padding = (2, 1) if first else (1, 0)
            layers += [
                nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(True),
            ]
        last = nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False)
        super().__init__(*layers, last, nn.Tanh())


class Siamese(nn.Module):
    """One encoder for two images; a head on the difference of what it says of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, 64),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return self.head((self.encoder(one) - self.encoder(other)).abs())


def _pair() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)


SPECIAL: dict[str, Callable[[], Entry]] = {
    "torchvision/fcos_resnet50_fpn (dense part)": lambda: _dense("fcos_resnet50_fpn"),
    "torchvision/retinanet_resnet50_fpn (dense part)": lambda: _dense("retinanet_resnet50_fpn"),
    "torchvision/ssdlite320_mobilenet_v3_large (dense part)": lambda: _dense(
        "ssdlite320_mobilenet_v3_large"
    ),
    "transformers/DINOv2 (SwiGLU)": lambda: of_transformers("Dinov2Config", use_swiglu_ffn=True),
    "transformers/DeBERTa-v2 (relative)": lambda: of_transformers(
        "DebertaV2Config", relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "transformers/DETR (small ResNet)": _detr,
    "peft/LLaMA with LoRA": lambda: Entry("peft", _with_lora, tokens),
    "diffusers/UNet2DModel (scale and shift)": lambda: of_diffusers(
        "UNet2DModel", resnet_time_scale_shift="scale_shift"
    ),
    "own/DCGAN generator": lambda: Entry("torch", Generator, lambda: (torch.randn(2, 64, 1, 1),)),
    "own/Siamese net": lambda: Entry("torch", Siamese, _pair),
}
"""Models that their name alone does not say how to build -> what builds their entry."""

HELD_OUT = (
    *(name for name in SPECIAL if not name.startswith("torchvision/")),
    *(f"transformers/{name}" for name in TRANSFORMERS),
    *(f"diffusers/{name}" for name in DIFFUSERS),
    *(name for name in SPECIAL if name.startswith("torchvision/")),
    *(f"torchvision/{name}" for name in TORCHVISION),
    *(f"timm/{name}" for name in TIMM),
    *LISTED,
)
"""The names of the held-out list, in the order of its table."""
