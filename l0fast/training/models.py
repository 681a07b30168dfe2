"""The dense models of the command: the published MLP and LeNet, torchvision's, the user's own."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast._extras import require
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.maths.hard_concrete import HardConcrete

MODELS = ("mlp", "lenet5")
CHOICES = "'mlp', 'lenet5', a torchvision model such as 'resnet18', or 'package.module:callable'"
WITH_AUXILIARY_OUTPUTS = ("googlenet", "inception_v3")
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
    convolutions, so that they are large enough to be pooled twice.
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
            pool1=nn.MaxPool2d(2),  # before ReLU: the same function, a quarter of the ReLUs
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


def from_torchvision(name: str) -> bool:
    """Whether `name` is a classifier of torchvision, and not a model of l0fast or of the user.

    Raises:
        ValueError: there is no such model.
    """
    if name in MODELS or ":" in name:
        return False
    require("train", "torchvision")
    from torchvision import models

    if name not in models.list_models(module=models):
        _checks.refuse("model", name, CHOICES)
    return True


def _load_callable(name: str) -> Callable[..., Any]:
    """Imports `package.module:callable`; the working directory is searched, too."""
    module_name, _, path = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:
        _checks.refuse("model", name, f"package.module:callable ({_one_line(error)})")
    if not callable(found):
        _checks.refuse("model", name, f"package.module:callable, not a {type(found).__name__}")
    return found


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _build_other(name: str, in_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Builds a model of torchvision or of the user, and runs it on one example."""
    options: dict[str, Any] = {"num_classes": num_classes}
    if from_torchvision(name):
        from torchvision import models

        if name in WITH_AUXILIARY_OUTPUTS:
            options |= {"aux_logits": False, "init_weights": True}
        model = models.get_model(name, **options)
    else:
        build = _load_callable(name)
        try:
            parameters = inspect.signature(build).parameters.values()
            if not any(p.name == "num_classes" or p.kind == p.VAR_KEYWORD for p in parameters):
                options = {}
            model = build(**options)
        except Exception as error:
            _checks.refuse("model", name, f"a callable that builds a model ({_one_line(error)})")
        if not isinstance(model, nn.Module):
            expected = f"a callable that returns a torch.nn.Module, not {type(model).__name__}"
            _checks.refuse("model", name, expected)
    expected = f"a model with {num_classes} outputs for an example of shape {tuple(in_shape)}"
    try:
        with torch.no_grad():
            output = model.eval()(torch.zeros(1, *in_shape))
    except Exception as error:
        _checks.refuse("model", name, f"{expected} ({_one_line(error)})")
    if not isinstance(output, Tensor) or output.shape != (1, num_classes):
        got = tuple(output.shape[1:]) if isinstance(output, Tensor) else type(output).__name__
        _checks.refuse("model", name, f"{expected}, not {got}")
    return model.train()


def build(
    name: str, in_shape: Sequence[int], num_classes: int, widths: Sequence[int] | None = None
) -> nn.Module:
    """Builds a dense model by its name.

    Args:
        name: "mlp", "lenet5", the name of one of torchvision's classifiers, or
            "package.module:callable"; the callable gets num_classes if it takes that argument.
        in_shape: of one example; (channels, height, width) of an image.
        num_classes: outputs.
        widths: of the hidden layers. The MLP takes any number of them (300-100 by default); LeNet
            takes two convolutions and one hidden layer (20-50-500). Other models take none.

    Raises:
        ValueError: the name is unknown, the widths do not fit it, or the model does not accept such
            an example or has other outputs.
    """
    if name not in MODELS:
        if widths is not None:
            _checks.refuse("widths", widths, f"none: only {' and '.join(MODELS)} have widths")
        return _build_other(name, in_shape, num_classes)
    widths = tuple(widths or WIDTHS[name])
    if not all(isinstance(width, int) and width >= 1 for width in widths):
        _checks.refuse("widths", widths, "whole numbers >= 1")
    if name == "mlp":
        return mlp(math.prod(in_shape), num_classes, widths)
    if len(widths) != 3:
        _checks.refuse("widths", widths, "three numbers for lenet5: conv, conv, hidden")
    if len(in_shape) != 3:
        _checks.refuse(
            "model", name, f"another model: examples of shape {tuple(in_shape)} are not images"
        )
    return lenet5(in_shape, num_classes, widths)


def load_pretrained_(model: nn.Module, path: Path) -> None:
    """Loads the weights of a file into a dense model, in place: all of them, or none.

    Args:
        model: made by `build`.
        path: of a state dict, as .safetensors, or in a file that torch.load reads with
            weights_only.

    Raises:
        ValueError: the file cannot be read, or its state does not fit this model.
    """

    def refuse(problem: str) -> NoReturn:
        _checks.refuse("pretrained", str(path), f"a file with the state of the model ({problem})")

    if not path.is_file():
        refuse("there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refuse(f"it cannot be read: {_one_line(error)}")
    wanted = model.state_dict()
    if not isinstance(state, dict):
        refuse(f"it holds a {type(state).__name__}")
    for name in sorted({*map(str, state)} ^ wanted.keys()):
        refuse(f"it has {'no' if name in wanted else 'a'} {name!r}")
    for name, value in wanted.items():
        got = tuple(state[name].shape) if isinstance(state[name], Tensor) else "no tensor"
        if got != tuple(value.shape):
            refuse(f"its {name!r} is {got}, not {tuple(value.shape)}")
    model.load_state_dict(state)


PUBLISHED_SETTINGS: dict[str, Any] = {
    "epochs": 200,
    "batch_size": 128,
    "lr": 7e-4,
    "gate_lr": 7e-4,
    "dual_lr": 1e-4,
    "weight_decay": 0.0,
    "schedule": "constant",
    "target_schedule": "constant",
    "start": 0.0,
    "settle": 0.0,
}
"""The published settings: Adam for weights and gates, gradient ascent for the multiplier."""


def sparsify_published_(
    model: nn.Module, example_inputs: Any = None, skip: str | bool = "auto"
) -> nn.Module:
    """Puts in the gates of the published MNIST runs, and initialises as they do, in place.

    Gates on conv outputs and Linear inputs; droprate 0.5 (0.2 on an MLP's first layer); weights
    He-normal (fan-out for Linear, fan-in for convolutions) divided by (1 - droprate), biases 0;
    log_alpha kept within log(100).

    The publication does not say which fan is used. Of six initialisations tried on the MLP, this
    one has the density, multiplier and error of the authors' code at epoch 10. The fan of the
    convolutions is an assumption.

    Args:
        model: the MLP or LeNet.
        example_inputs, skip: as in `sparsify_`.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (all but the fans).
    """
    first = next(name for name, layer in model.named_modules() if list(layer.parameters(False)))
    droprates = {"*": 0.5}
    if isinstance(model.get_submodule(first), nn.Linear):
        droprates[first] = 0.2
    distribution = HardConcrete(bound=math.log(100))
    sparsify_(
        model,
        droprate_init=droprates,
        distribution=distribution,
        example_inputs=example_inputs,
        skip=skip,
    )
    with torch.no_grad():
        for name, layer in gated_layers(model).items():
            mode = "fan_out" if isinstance(layer, nn.Linear) else "fan_in"
            nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            layer.weight.div_(1 - droprates.get(name, droprates["*"]))
            if layer.bias is not None:
                layer.bias.zero_()
    return model
