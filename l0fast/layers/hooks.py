"""The hooks of a module: l0fast's own, and those of others, which must see every unit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as modules


class OwnHook:
    """What l0fast registers on a layer of the user's to stay there."""


def foreign_hooks(module: nn.Module) -> list[Any]:
    """The forward and backward hooks of a module that are not l0fast's own."""
    if not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    ):
        return []  # nearly always, and each step asks it of each layer
    hooks = [
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
        *module._backward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]
    return [hook for hook in hooks if not isinstance(hook, OwnHook)]


def seen_backward() -> bool:
    """Whether somebody sees the gradients of all modules' inputs."""
    return bool(modules._global_backward_hooks)


def remove_hooks(module: nn.Module, ours: Callable[[Any], bool]) -> None:
    """Removes the forward hooks and pre-hooks of a module for which `ours` is true."""
    for hooks, options in (
        (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
        (
            module._forward_hooks,
            [module._forward_hooks_with_kwargs, module._forward_hooks_always_called],
        ),
    ):
        for key in [key for key, hook in hooks.items() if ours(hook)]:
            del hooks[key]
            for option in options:
                option.pop(key, None)
