"""Running a model in float64 with little memory: its weights are widened while they are used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from l0fast.graph.calls import Example, own_buffers

Maker = Callable[[torch.dtype | None], nn.Module]
"""Makes a layer anew in a dtype."""


def widened(example: Example, dtype: torch.dtype) -> Example:
    """An example with its floating tensors in `dtype`."""
    return example.map(lambda one: one.to(dtype) if one.is_floating_point() else one)


def holders_that_run(model: nn.Module, example: Example) -> dict[str, str]:
    """Name of each module with parameters -> name of the module that needs them when it is called:
    the same one where its own forward runs, else the innermost module around it that runs.

    Args:
        model: in evaluation; it is run.
        example: what its forward takes.
    """
    ran: set[str] = {""}
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    try:
        example.call(model)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if module._parameters:
            around = name
            while around not in ran:
                around = around.rpartition(".")[0]
            found[name] = around
    return found


def _parts(made: nn.Module) -> list[nn.Module]:
    """What is made anew with a layer: a gather or a scatter around it, but no modules inside it."""
    return list(made.modules()) if type(made) is nn.Sequential else [made]


class _Grouped(TorchFunctionMode):
    """Products of groups of rows, each with a matrix of its own, which PyTorch has in narrow dtypes
    alone, are computed group by group."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not getattr(torch, "_grouped_mm", None) or args[0].dtype != torch.float64:
            return func(*args, **kwargs)
        rows, matrices = args
        ends = kwargs["offs"].tolist()
        given = rows.new_zeros(len(rows), matrices.shape[-1])
        for matrix, first, last in zip(matrices, [0, *ends], ends, strict=False):
            given[first:last] = rows[first:last] @ matrix
        return given


class _Doubling(TorchFunctionMode):
    """Ops that a forward asks for in float32 are in float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args, kwargs = tree_map(_doubled, (args, kwargs or {}))
        return func(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@contextmanager
def float64_for_float32() -> Generator[None]:
    """Makes the tensors that a forward itself makes float64, where it asks for float32 or names no
    dtype: next to them a model of float64 cannot run, as its weights are."""
    before = torch.get_default_dtype()
    if before == torch.float32:
        torch.set_default_dtype(torch.float64)
    try:
        with _Doubling():
            yield
    finally:
        torch.set_default_dtype(before)


class _Swap:
    """Puts wide tensors into some modules while one of them runs, and the own ones back."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.modules: list[nn.Module] = []
        self.made: list[tuple[nn.Module, Maker]] = []
        """Layers that are made anew in the dtype, and how."""
        self._own: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._depth = 0

    def _put(self, owned: dict[str, Any], wide: dict[str, Any]) -> None:
        self._own.append((owned, dict(owned)))
        owned.update(wide)

    def enter(self, *_: Any) -> None:
        """Pre-hook: a module that runs inside its own forward is wide already."""
        self._depth += 1
        if self._depth > 1:
            return
        with _disable_current_modes():  # they are to see what the model computes
            self._widen()

    def _widen(self) -> None:
        for module, make in self.made:
            for part, new in zip(_parts(module), _parts(make(self.dtype)), strict=True):
                self._put(part._parameters, new._parameters)
                self._put(part._buffers, new._buffers)
        for module in self.modules:
            wide = {
                key: nn.Parameter(value.data.to(self.dtype), requires_grad=False)
                for key, value in module._parameters.items()
                if value is not None and value.is_floating_point()
            }
            self._put(module._parameters, wide)

    def leave(self, *_: Any) -> None:
        """Hook: the module's own tensors are back."""
        self._depth -= 1
        if self._depth == 0:
            self.restore()

    def restore(self) -> None:
        """Puts everything back."""
        for owned, own in reversed(self._own):
            owned.update(own)
        self._own, self._depth = [], 0


@contextmanager
def in_precision(
    model: nn.Module,
    dtype: torch.dtype | None,
    holders: Mapping[str, str],
    makers: Mapping[str, Maker] | None = None,
) -> Generator[None]:
    """Makes a model compute in `dtype`: each weight is widened when the module that needs it is
    entered, and put back when that module is left.

    Args:
        model: to run inside.
        dtype: None for the model's own.
        holders: see `holders_that_run`; {} widens all weights when the model is entered.
        makers: layers that are made anew in the dtype, from what they were made of.
    """
    makers = makers or {}
    with own_buffers(model, dtype):
        modules = dict(model.named_modules())
        swaps: dict[str, _Swap] = {}
        inside = {id(part) for name in makers for part in _parts(modules[name])}
        for name in makers:
            around = holders.get(name, "")
            swaps.setdefault(around, _Swap(dtype)).made.append((modules[name], makers[name]))
        for name, module in modules.items():
            if dtype is not None and module._parameters and id(module) not in inside:
                around = holders.get(name, "")
                swaps.setdefault(around, _Swap(dtype)).modules.append(module)
        handles: list[Any] = []
        for name, swap in swaps.items():
            module = modules[name]
            handles.append(module.register_forward_pre_hook(swap.enter, prepend=True))
            handles.append(module.register_forward_hook(swap.leave, always_call=True))
        try:
            with _Grouped() if dtype == torch.float64 else nullcontext():
                yield
        finally:
            for handle in handles:
                handle.remove()
            for swap in swaps.values():
                swap.restore()
