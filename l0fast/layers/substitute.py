"""Other gates for a while: a gated model is tried out with other log_alphas than its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l0fast.layers.drawn import DRAWN


@contextmanager
def with_log_alpha(layers: Mapping[str, Any], values: Mapping[str, Tensor]) -> Generator[None]:
    """Gives gated layers other log_alphas; afterwards they have their own back, and their draws.

    Layers that share a log_alpha share the other one too.

    Args:
        layers: name -> layer; all those of the model that share gates with one another.
        values: name of a layer -> its log_alpha inside, of the same shape. One name is enough for
            those that share; a layer that is not named keeps its own.
    """
    others = {
        id(layers[name].log_alpha): nn.Parameter(value, layers[name].log_alpha.requires_grad)
        for name, value in values.items()
    }
    before = [
        (layer, layer.log_alpha, {key: layer.__dict__[key] for key in DRAWN})
        for layer in layers.values()
        if id(layer.log_alpha) in others
    ]
    try:
        for layer, own, _ in before:
            layer._parameters["log_alpha"] = others[id(own)]
            layer._forget_draws()  # they are of its own log_alpha
        yield
    finally:
        for layer, own, draws in before:
            layer._parameters["log_alpha"] = own
            layer.__dict__.update(draws)
