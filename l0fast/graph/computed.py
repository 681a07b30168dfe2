"""Weights that something computes before each forward, as weight_norm does: they are no parameters
of their layers, so that nothing can be left out of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from l0fast.graph.calls import MODULE_ATTRIBUTES

_HOOKS = {
    "WeightNorm": ("weight_norm", "torch.nn.utils.remove_weight_norm"),
    "SpectralNorm": ("spectral_norm", "torch.nn.utils.remove_spectral_norm"),
    "BasePruningMethod": ("a mask of torch.nn.utils.prune", "torch.nn.utils.prune.remove"),
}
"""Class of a forward pre-hook that computes a weight -> its name, and what removes it."""

WEIGHTS = ("weight", "bias")


def own_weights(module: nn.Module, names: Collection[str] = WEIGHTS) -> bool:
    """Whether a module has its weights as parameters, or as None; those that its class has."""
    return not any(
        name not in module._parameters and (name in vars(module) or hasattr(type(module), name))
        for name in names
    )


def _computed_by(module: nn.Module, name: str) -> tuple[str, str]:
    """What computes a weight, and what makes it a parameter; "" where it is not known."""
    if parametrize.is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        kind = type(parametrizations[name][0]).__name__
        if kind.startswith("_"):  # PyTorch's own, which the user knows by a function: _WeightNorm
            kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind[1:]).lower()
        return kind, "torch.nn.utils.parametrize.remove_parametrizations"
    hooks: list[object] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        for kind in type(hook).__mro__:
            if kind.__name__ in _HOOKS:
                return _HOOKS[kind.__name__]
    return "", ""


def why_computed(module: nn.Module, names: Collection[str] = WEIGHTS) -> str:
    """Why some weight of a module is not a parameter of its own, and what makes it one; "" where
    all are."""
    for name in names:
        if not own_weights(module, [name]):
            kind, remove = _computed_by(module, name)
            if not kind:
                return f"its {name} is not a parameter"
            return f"its {name} is computed by {kind}; call {remove} first"
    return ""


def computed_tensors(model: nn.Module) -> list[Tensor]:
    """The results of autograd that modules keep as attributes: what was computed last."""
    return [
        leaf
        for module in model.modules()
        for leaf in tree_leaves([v for k, v in vars(module).items() if k not in MODULE_ATTRIBUTES])
        if isinstance(leaf, Tensor) and not leaf.is_leaf
    ]


def copied(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """copy.deepcopy of a model, which by itself refuses the results of autograd.

    Args:
        model: to copy.
        memo: as copy.deepcopy takes it.
    """
    computed = {id(one): one.detach().clone() for one in computed_tensors(model)}
    return copy.deepcopy(model, {**computed, **(memo or {})})
