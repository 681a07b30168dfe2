"""How a user's model is called: out of its wrappers, on an example, in evaluation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def example_args(example_inputs: Any) -> tuple[Any, ...]:
    """The positional arguments of a model's forward that `example_inputs` stands for."""
    return tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)


_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""Classes that stand around a user's model -> where they keep it."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model, out of what torch.compile and data parallelism put around it."""
    while type(model).__name__ in _WRAPPERS:
        model = model.get_submodule(_WRAPPERS[type(model).__name__])
    return model


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Puts the model into evaluation, without autograd, and every module back after it.

    Back are also plain attributes that a forward has set, such as a cache or a counter.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for key in [key for key in now if key not in attributes]:
                del now[key]
            now.update(attributes)
