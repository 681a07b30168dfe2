"""How the modules of a model are called when it runs: with which arguments, of which kinds."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Constant = None | bool | str
"""What an argument may be that decides what a forward does."""


class Calls:
    """How modules are called on the example: with which arguments, of which kinds."""

    def __init__(self) -> None:
        self._seen: dict[nn.Module, list[dict[str, Any]]] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._seen

    @contextmanager
    def of(self, modules: Sequence[nn.Module]) -> Generator[None]:
        """Notes the calls of some modules."""
        hooks = [
            module.register_forward_pre_hook(self._note, with_kwargs=True) for module in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        self._seen.setdefault(module, []).append(dict(bound.arguments))

    def forms(self, module: nn.Module) -> tuple[dict[str, Constant], dict[str, int]] | None:
        """The arguments that are constants, and those that are tuples; None where one is neither,
        nor a tensor or a number."""
        calls = self._seen.get(module, [])
        constants: dict[str, Constant] = {}
        lengths: dict[str, int] = {}
        for name, one in inspect.signature(module.forward).parameters.items() if calls else ():
            given = [call[name] for call in calls]
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                if any(given):
                    return None
            elif all(isinstance(value, Constant) for value in given):
                if len(set(given)) > 1:
                    return None
                constants[name] = given[0]
            elif all(isinstance(value, (tuple, list)) for value in given):
                if len({len(value) for value in given}) > 1:
                    return None
                lengths[name] = len(given[0])
            elif not all(isinstance(value, (Tensor, int, float)) for value in given):
                return None
        return (constants, lengths) if calls else None
