"""Other gates for a while: a gated model is tried out with other log_alphas than its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l0fast.layers.gated import Gated


@contextmanager
def with_log_alpha(layers: Mapping[str, Gated], values: Mapping[str, Tensor]) -> Generator[None]:
    """Gives gated layers other log_alphas; afterwards they have their own back.

    The layers' own parameters are put aside, not written to. Layers that share a log_alpha share
    the other one too.

    Args:
        layers: name -> layer; all those of the model that share gates with one another.
        values: name of a layer -> its log_alpha inside, of the same shape. One name is enough for
            those that share; a layer that is not named keeps its own.
    """
    others = {
        id(layers[name].log_alpha): nn.Parameter(value, layers[name].log_alpha.requires_grad)
        for name, value in values.items()
    }
    before: list[tuple[Any, nn.Parameter]] = [
        (layer, layer.log_alpha) for layer in layers.values() if id(layer.log_alpha) in others
    ]
    try:
        for layer, log_alpha in before:
            layer._parameters["log_alpha"] = others[id(log_alpha)]
        yield
    finally:
        for layer, log_alpha in before:
            layer._parameters["log_alpha"] = log_alpha
