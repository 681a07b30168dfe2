"""How a user's model is called: out of its wrappers, on an example, in evaluation."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
def own_buffers(model: nn.Module, dtype: torch.dtype | None = None) -> Generator[None]:
    """Gives a model copies of its buffers, so that a forward cannot change its own; those of
    floating dtypes in `dtype`, if one is named."""
    before = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    copies: dict[int, Tensor] = {}
    try:
        for owned, buffers in before:
            for key, value in buffers.items():
                if value is None:
                    continue
                if id(value) not in copies:
                    wide = dtype is not None and value.is_floating_point()
                    copies[id(value)] = value.to(dtype, copy=True) if wide else value.clone()
                owned[key] = copies[id(value)]
        yield
    finally:
        for owned, buffers in before:
            owned.update(buffers)


@contextmanager
def own_randomness(model: nn.Module, seed: int | None = None) -> Generator[None]:
    """Takes no random numbers from the user's generators: after it they are where they were.

    Args:
        model: says which devices have a generator.
        seed: for the same random numbers every time.
    """
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        if seed is not None:
            torch.manual_seed(seed)
        yield


MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def _contents(module: nn.Module) -> dict[str, Any]:
    """What the lists, dicts and sets that a module keeps hold now."""
    return {
        key: copy.copy(value)
        for key, value in vars(module).items()
        if key not in MODULE_ATTRIBUTES and type(value) in (list, dict, set)
    }


@contextmanager
def evaluating(model: nn.Module) -> Generator[None, None, None]:
    """Puts the model into evaluation, without autograd, and every module back after it.

    Back are also buffers, attributes that a forward has set, and the contents of lists, dicts and
    sets that a module keeps, such as a cache.
    """
    before = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), own_buffers(model):
            yield
    finally:
        for module, attributes, contents in before:
            now = vars(module)
            for key in [key for key in now if key not in attributes]:
                del now[key]
            now.update(attributes)
            for key, content in contents.items():
                now[key].clear()
                (now[key].extend if isinstance(content, list) else now[key].update)(content)
