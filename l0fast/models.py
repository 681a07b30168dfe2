"""The models of the command, dense: the published MLP and LeNet, with widths by argument."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from l0fast import _checks
from l0fast.draw import gated_layers
from l0fast.hard_concrete import HardConcrete
from l0fast.sparsify import sparsify_

MODELS = ("mlp", "lenet5")
WIDTHS = {"mlp": (300, 100), "lenet5": (20, 50, 500)}


def mlp(in_features: int, num_classes: int, widths: Sequence[int] = WIDTHS["mlp"]) -> nn.Sequential:
    """[N, ...] -> [N, num_classes]: fully connected layers of the given widths, with ReLU."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    sizes = (in_features, *widths, num_classes)
    for index in range(1, len(sizes)):
        layers[f"fc{index}"] = nn.Linear(sizes[index - 1], sizes[index])
        if index < len(sizes) - 1:
            layers[f"relu{index}"] = nn.ReLU()
    return nn.Sequential(layers)


def lenet5(
    in_shape: Sequence[int], num_classes: int, widths: Sequence[int] = WIDTHS["lenet5"]
) -> nn.Sequential:
    """[N, channels, height, width] -> [N, num_classes]: two 5x5 convolutions, two Linear.

    28x28 images give the published 20-50-800-500. Images under 16 pixels get padded 3x3
    convolutions, so that there is something left to pool.
    """
    channels, height, width = in_shape
    first, second, hidden = widths
    small = min(height, width) < 16
    kernel, padding = (3, 1) if small else (5, 0)

    def side(size: int) -> int:
        for _ in range(2):
            size = (size + 2 * padding - kernel + 1) // 2
        return size

    features = second * side(height) * side(width)
    if features < 1:
        _checks.refuse("in_shape", tuple(in_shape), "images of at least 4x4 pixels")
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(channels, first, kernel, padding=padding),
            pool1=nn.MaxPool2d(2),  # pooling first: the same function, a quarter of the ReLUs
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(first, second, kernel, padding=padding),
            pool2=nn.MaxPool2d(2),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc1=nn.Linear(features, hidden),
            relu3=nn.ReLU(),
            fc2=nn.Linear(hidden, num_classes),
        )
    )


def build(
    name: str, in_shape: Sequence[int], num_classes: int, widths: Sequence[int] | None = None
) -> nn.Sequential:
    """A dense model by name.

    Args:
        name: "mlp" or "lenet5".
        in_shape: (channels, height, width) of one example.
        num_classes: outputs.
        widths: of the hidden layers; MLP: any number, 300-100 by default; LeNet: two
            convolutions and one hidden layer, 20-50-500 by default.

    Raises:
        ValueError: an unknown name, or widths that do not fit it.
    """
    _checks.one_of("model", name, MODELS)
    widths = tuple(widths or WIDTHS[name])
    if not all(isinstance(width, int) and width >= 1 for width in widths):
        _checks.refuse("widths", widths, "whole numbers >= 1")
    if name == "mlp":
        channels, height, width = in_shape
        return mlp(channels * height * width, num_classes, widths)
    if len(widths) != 3:
        _checks.refuse("widths", widths, "three numbers for lenet5: conv, conv, hidden")
    return lenet5(in_shape, num_classes, widths)


PUBLISHED_SETTINGS: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "lr": 7e-4,
    "gate_lr": 7e-4,
    "dual_lr": 1e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
}
"""The published optimiser: Adam for weights and gates, gradient ascent for the multiplier."""


def sparsify_published_(model: nn.Module) -> nn.Module:
    """Gates and initialisation of the published MNIST runs, in place.

    Gates on conv outputs and Linear inputs; droprate 0.5 (0.2 on an MLP's first layer); weights
    He-normal (fan-out for Linear, fan-in for convolutions) divided by (1 - droprate), biases 0;
    log_alpha kept within log(100).

    The fan of the Linear weights is inferred, not read: of six initialisations tried on the MLP it
    is the one whose density, multiplier and error at epoch 10 are those of the authors' code. That
    of the convolutions is an assumption.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (all but the fans).
    """
    first = next(name for name, layer in model.named_modules() if list(layer.parameters(False)))
    droprates = {"*": 0.5}
    if isinstance(model.get_submodule(first), nn.Linear):
        droprates[first] = 0.2
    distribution = HardConcrete(bound=math.log(100))
    sparsify_(model, droprate_init=droprates, distribution=distribution)
    with torch.no_grad():
        for name, layer in gated_layers(model).items():
            mode = "fan_out" if isinstance(layer, nn.Linear) else "fan_in"
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            layer.weight.div_(1 - droprates.get(name, droprates["*"]))
            if layer.bias is not None:
                layer.bias.zero_()
    return model
