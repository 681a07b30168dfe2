"""Dense models for the large steps in their published shapes: ResNet-50, WRN-28-10, ViT-B/16."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            _conv(inputs, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, outputs, 1),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if inputs != outputs:
            self.skip = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.skip(x))


def resnet50() -> nn.Sequential:
    """[N, 3, 224, 224] -> [N, 1000] (He et al., 2016)."""
    layers: list[nn.Module] = [
        _conv(3, 64, 7, 2),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            layers.append(_Bottleneck(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


class _Wide(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        self.branch = nn.Sequential(
            _conv(inputs, width, 3, stride),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            _conv(width, width, 3),
        )
        self.skip: nn.Module | None = None if inputs == width else _conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        ready = self.first(x)
        return self.branch(ready) + (x if self.skip is None else self.skip(ready))


def wrn28_10() -> nn.Sequential:
    """[N, 3, 32, 32] -> [N, 10] (Zagoruyko and Komodakis, 2016)."""
    layers: list[nn.Module] = [_conv(3, 16, 3)]
    inputs = 16
    for width, stride in ((160, 1), (320, 2), (640, 2)):
        for index in range(4):
            layers.append(_Wide(inputs, width, stride if index == 0 else 1))
            inputs = width
    return nn.Sequential(
        *layers,
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inputs, 10),
    )


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Encoder(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(width), _Attention(width, heads)
        self.between = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


class ViT(nn.Module):
    """A vision transformer that reads its class off a token of its own."""

    def __init__(
        self,
        image: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        hidden: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(_Encoder(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit_b16() -> ViT:
    """[N, 3, 224, 224] -> [N, 1000] (Dosovitskiy et al., 2021)."""
    return ViT(image=224, patch=16, width=768, depth=12, heads=12, hidden=3072, classes=1000)


def gate_counts(model: nn.Module) -> tuple[int, ...]:
    """How many gates each layer has: a conv's output channels, a Linear's inputs."""
    return tuple(
        layer.out_channels if isinstance(layer, nn.Conv2d) else layer.in_features
        for layer in model.modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    )


def vit_b_gate_counts() -> tuple[int, ...]:
    """ViT-B/16: in each of 12 blocks, 12 heads and 3072 hidden units."""
    return (12, 3072) * 12
