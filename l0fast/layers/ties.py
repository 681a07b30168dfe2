"""Gates that several layers share stay shared, however a state is saved and loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

GATES = "log_alpha"
ATTRIBUTE = "_l0fast"
"""The one attribute that l0fast puts on a user's module: its handle (see `handle`)."""


def _sharing(model: nn.Module) -> dict[str, str]:
    owners: dict[int, str] = {}
    first: dict[str, str] = {}
    for name, module in model.named_modules():
        gates = module._parameters.get(GATES)
        if gates is not None:
            first[name] = owners.setdefault(id(gates), name)
    several = {owner for name, owner in first.items() if name != owner}
    return {name: owner for name, owner in first.items() if owner in several}


def _before(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Pre-hook of loading: remembers who shares, and gives each what the state has for one.

    safetensors' save_model keeps one name of each tensor, and its load_model asks that the others
    be missing. A state without any gates is a dense model's: there they stay as they are.
    """
    missing: list[str] = others[2]
    model.__dict__[ATTRIBUTE].sharing = sharing = _sharing(model)
    keys = {name: f"{prefix}{name}.{GATES}" for name in sharing}
    held = {sharing[name]: state[key] for name, key in keys.items() if key in state}
    for name, key in keys.items():
        if key not in state and sharing[name] in held:
            state[key] = held[sharing[name]]
            missing.append(key)


def _after(model: nn.Module, _keys: Any) -> None:
    """Post-hook of loading: with assign=True, each layer was given a parameter of its own."""
    handle = model.__dict__[ATTRIBUTE]
    sharing, handle.sharing = handle.sharing, {}
    for name, owner in sharing.items():
        gates = model.get_submodule(owner)._parameters[GATES]
        model.get_submodule(name)._parameters[GATES] = gates


def _saved(model: nn.Module, state: dict[str, Any], prefix: str, _local: Any) -> None:
    """Post-hook of saving: gives each layer a copy of its own of gates that are shared, since
    safetensors refuses tensors with one memory.

    Parameters themselves (of keep_vars=True) stay.
    """
    for name, owner in _sharing(model).items():
        key = f"{prefix}{name}.{GATES}"
        if name != owner and key in state and not isinstance(state[key], nn.Parameter):
            state[key] = state[key].clone()


def attach_ties(model: nn.Module) -> None:
    """Makes whatever saves the state of `model`, or of what it is a part of, copy what is tied, and
    whatever loads one keep the ties."""
    if _after not in model._load_state_dict_post_hooks.values():
        model.register_load_state_dict_pre_hook(_before)
        model.register_load_state_dict_post_hook(_after)
        model.register_state_dict_post_hook(_saved)


def detach_ties(module: nn.Module) -> None:
    """Undoes `attach_ties`."""
    for hooks in (
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
        module._state_dict_hooks,
    ):
        for key, hook in list(hooks.items()):
            own = getattr(hook, "hook", hook)  # PyTorch wraps those of the first
            if own in (_before, _after, _saved):
                del hooks[key]
