"""Small models of many kinds, with an example each: what the zoo test prunes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.googlenet import BasicConv2d, Inception

from tests.helpers.plain_models import LeNet


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 16), activation(), nn.Linear(16, 10), activation(), nn.Linear(10, 4)
    )


def vgg() -> nn.Module:
    features = tv.vgg.make_layers([8, "M", 12, "M", 16], batch_norm=True)
    model = tv.VGG(features, num_classes=5)
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier = nn.Sequential(
        nn.Linear(16 * 4, 20), nn.ReLU(True), nn.Dropout(), nn.Linear(20, 5)
    )
    return model


def channelwise() -> nn.Module:
    """Every kind of layer with a number for each channel, with and without numbers to learn."""
    layers: list[nn.Module] = []
    for index, layer in enumerate(
        [
            nn.GroupNorm(3, 12),
            nn.GroupNorm(4, 12, affine=False),
            nn.InstanceNorm2d(12, affine=True),
            nn.InstanceNorm2d(12),
            nn.InstanceNorm2d(12, track_running_stats=True),
            nn.PReLU(12),
        ]
    ):
        layers += [nn.Conv2d(12 if index else 3, 12, 3, padding=1), layer, nn.SiLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class UNet(nn.Module):
    """Two levels with batch norm, a skip connection and an upsampling in between."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.down = self.block(3, width)
        self.bottom = self.block(width, 2 * width)
        self.up = self.block(3 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def block(before: int, after: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(True),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        deep = self.bottom(F.max_pool2d(skip, 2))
        deep = F.interpolate(deep, scale_factor=2.0, mode="nearest")
        return self.head(self.up(torch.cat([deep, skip], 1)))


def dcgan(latent: int = 10, width: int = 4) -> nn.Module:
    """A generator: from numbers to an image of 16 x 16."""
    widths = [latent, 4 * width, 2 * width]
    layers: list[nn.Module] = []
    for place, (before, after) in enumerate(itertools.pairwise(widths)):
        stride, padding = (2, 1) if place else (1, 0)
        layers.append(nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False))
        layers += [nn.BatchNorm2d(after), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1), nn.Tanh())


class Autoencoder(nn.Module):
    """Without norms; its decoder ends at the size of what the encoder took."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, 12, 3, 2, 1), nn.ReLU()
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(12, width, 3, 2, 1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 3, 2, 1, output_padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class FusedAttention(nn.Module):
    """One Linear for q, k and v; the sizes of a head come from the input's (as in nanoGPT)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.n_head = heads

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.c_attn(x).split(width, dim=2)
        q, k, v = (
            part.view(batch, time, self.n_head, width // self.n_head).transpose(1, 2)
            for part in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, time, width))


class SplitAttention(nn.Module):
    """One Linear for q, k and v; sizes are the module's own attributes (as in timm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.attn_dim = width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        qkv = self.qkv(x).reshape(batch, time, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        y = attention.softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, time, self.attn_dim))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), attention
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """The head's weight is the embedding's."""

    def __init__(self, attention: Callable[[int, int], nn.Module], width: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(23, width), nn.Embedding(8, width)
        self.h = nn.ModuleList(Block(attention(width, 4), width) for _ in range(2))
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 23, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class BertAttention(nn.Module):
    """q, k and v apart, a mask, and the merged size written out as an attribute."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, width // heads
        self.all_head_size = width
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense = nn.Linear(width, width)

    def heads(self, x: Tensor) -> Tensor:
        sizes = self.num_attention_heads, self.attention_head_size
        return x.view(*x.shape[:-1], *sizes).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.attention_head_size) + mask
        y = torch.matmul(F.softmax(scores, dim=-1), v).permute(0, 2, 1, 3).contiguous()
        return self.dense(y.view(*y.shape[:2], self.all_head_size))


class Bert(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(23, width)
        self.attention, self.norm_1 = BertAttention(width, 4), nn.LayerNorm(width)
        self.intermediate, self.output = nn.Linear(width, 32), nn.Linear(32, width)
        self.norm_2, self.pooler = nn.LayerNorm(width), nn.Linear(width, width)
        self.classifier = nn.Linear(width, 3)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        x = self.embeddings(tokens)
        mask = (1.0 - keep.to(x.dtype))[:, None, None, :] * -1e4
        x = self.norm_1(x + self.attention(x, mask))
        x = self.norm_2(x + self.output(F.gelu(self.intermediate(x))))
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Llama(nn.Module):
    """A block with rotary positions, 4 query heads for 2 key heads, and SwiGLU."""

    def __init__(self, width: int = 16, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.head_dim, self.groups = width // heads, heads // kv_heads
        self.embed = nn.Embedding(23, width)
        self.norm_1, self.norm_2, self.norm_3 = (RMSNorm(width) for _ in range(3))
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, 24, bias=False)
        self.up_proj = nn.Linear(width, 24, bias=False)
        self.down_proj = nn.Linear(24, width, bias=False)
        self.lm_head = nn.Linear(width, 23, bias=False)

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, time, size = x.shape
        x = x[:, :, None].expand(batch, heads, self.groups, time, size)
        return x.reshape(batch, heads * self.groups, time, size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        y = self.norm_1(x)
        shape = (*y.shape[:-1], -1, self.head_dim)
        q, k, v = (
            layer(y).view(shape).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        angle = torch.arange(tokens.shape[1])[:, None] / torch.arange(1, self.head_dim + 1)
        angle = angle.to(x.dtype)
        q, k = (rotated(part, angle.cos(), angle.sin()) for part in (q, k))
        y = F.scaled_dot_product_attention(q, self.repeated(k), self.repeated(v), is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(*tokens.shape, -1))
        y = self.norm_2(x)
        x = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return self.lm_head(self.norm_3(x))


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size)


def tokens() -> Tensor:
    return torch.randint(0, 23, (2, 6))


def mobilenet() -> nn.Module:
    setting = [[1, 8, 1, 1], [3, 8, 2, 2], [3, 12, 1, 2]]
    return tv.MobileNetV2(5, width_mult=0.5, inverted_residual_setting=setting, round_nearest=4)


def efficientnet() -> nn.Module:
    """With squeeze-and-excite branches."""
    block = tv.efficientnet.MBConvConfig
    setting = [block(1, 3, 1, 8, 8, 1), block(3, 3, 2, 8, 12, 2), block(3, 5, 1, 12, 16, 2)]
    return tv.EfficientNet(setting, dropout=0.1, num_classes=5, last_channel=24)


class Inceptions(nn.Module):
    """Modules whose branches are put side by side, each read by all branches of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = BasicConv2d(3, 8, kernel_size=3)
        self.first = Inception(8, 4, 4, 6, 4, 6, 4)
        self.second = Inception(20, 4, 4, 6, 4, 6, 4)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(self.stem(x))).mean((2, 3)))


def resnext() -> nn.Module:
    return tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=8)


def convnext() -> nn.Module:
    setting = [tv.convnext.CNBlockConfig(8, 12, 1), tv.convnext.CNBlockConfig(12, None, 1)]
    return tv.ConvNeXt(setting, num_classes=5, layer_scale=0.5)


def vit() -> nn.Module:
    return tv.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=5,
    )  # fmt: skip


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    **{
        f"mlp {activation.__name__}": (
            lambda activation=activation: mlp(activation),
            lambda: torch.randn(3, 12),
        )
        for activation in (nn.ReLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus)
    },
    "lenet": (lambda: LeNet(6, 10, 30), lambda: torch.randn(2, 1, 28, 28)),
    "vgg": (vgg, lambda: image(16)),
    "channelwise": (channelwise, lambda: image(8)),
    "resnet18": (
        lambda: tv.ResNet(tv.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5, width_per_group=64),
        lambda: image(32),
    ),
    "resnet50": (
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=16),
        lambda: image(32),
    ),
    "wide resnet": (
        lambda: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=32),
        lambda: image(32),
    ),
    "residual": (
        lambda: tv.ResNet(tv.resnet.BasicBlock, [2, 2, 1, 1], num_classes=5),
        lambda: image(32),
    ),
    "efficientnet": (efficientnet, lambda: image(32)),
    "shufflenet": (
        lambda: tv.ShuffleNetV2([2, 2, 2], [8, 8, 12, 16, 20], num_classes=5),
        lambda: image(32),
    ),
    "inception": (Inceptions, lambda: image(16)),
    "mobilenet": (mobilenet, lambda: image(32)),
    "resnext": (resnext, lambda: image(32)),
    "densenet": (
        lambda: tv.DenseNet(4, (1, 1, 2, 1), num_init_features=8, bn_size=2, num_classes=5),
        lambda: image(32),
    ),
    "convnext": (convnext, lambda: image(32)),
    "unet": (UNet, lambda: image(16)),
    "dcgan": (dcgan, lambda: torch.randn(2, 10, 1, 1)),
    "autoencoder": (Autoencoder, lambda: image(16)),
    "vit": (vit, lambda: image(16)),
    "gpt2": (lambda: GPT2(FusedAttention), tokens),
    "gpt2 with attributes": (lambda: GPT2(SplitAttention), tokens),
    "bert": (Bert, lambda: (tokens(), torch.ones(2, 6))),
    "llama": (Llama, tokens),
}
"""Name -> (builds the model, draws an example)."""
