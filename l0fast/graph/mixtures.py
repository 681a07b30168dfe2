"""The mixtures of experts in a model, and what is left of one without some of its experts.

A mixture is found where, in one forward on the example,

- a list of modules of one class, or a module with several weights of three dimensions, of which the
  first is as long in all, has a router beside it: a module with a matrix that has a row for each of
  them;
- the router is called first.

Of each it is tried out whether the model without some experts gives what it gives where the router
does not pick them. So it is with the mixtures of transformers (Mixtral, Qwen, DeepSeek without
groups of experts, GPT-OSS), and with own modules that loop over their experts or weigh all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.layers.dense_types import LAYERS, is_in_out, kind_of
from l0fast.layers.experts import Mixture

HEIGHT = 2
"""How many modules further out than its experts a router is looked for."""
_NEEDED = re.compile(r".*(top_?k|per_tok)")
"""Attributes that say how many of them each token needs."""


class _Watch(TorchFunctionMode):
    """Notes how many of some numbers `topk` is asked for: (how many numbers, in what module)."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        """The modules, as they are called."""
        self.rows: dict[str, list[int]] = {}
        """Module -> rows of the tensor that each of its calls gave."""
        self.running: list[str] = []
        self.asked: list[tuple[tuple[str, ...], int, int]] = []
        """(modules that run, how many numbers, how many of them)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.asked.append((tuple(self.running), args[0].shape[-1], given[0].shape[-1]))
        return given

    def enter(self, name: str) -> None:
        self.running.append(name)
        self.order.append(name)

    def leave(self, name: str, given: Any) -> None:
        self.running.pop()
        first = given[0] if isinstance(given, tuple) and given else given
        if isinstance(first, Tensor) and first.dim():
            self.rows.setdefault(name, []).append(first.numel() // max(first.shape[-1], 1))

    def topk(self, name: str, number: int) -> list[int]:
        """What is asked of `number` numbers in a module."""
        return [k for running, of, k in self.asked if name in running and of == number]


def _watched(model: nn.Module, example: Example) -> _Watch:
    watch = _Watch()
    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(lambda *_, name=name: watch.enter(name), prepend=True)
        )
        handles.append(module.register_forward_hook(lambda *a, name=name: watch.leave(name, a[-1])))
    try:
        with own_randomness(model), evaluating(model), watch:
            example.copy().call(model)
    finally:
        for handle in handles:
            handle.remove()
    return watch


def groups_of(model: nn.Module) -> Iterator[tuple[str, int, bool]]:
    """(name, number, whether it is a list) of what may be experts."""
    for name, module in model.named_modules():
        own = [one for one in module._parameters.values() if one is not None and one.dim() == 3]
        numbers = {one.shape[0] for one in own}
        if len(own) > 1 and len(numbers) == 1 and min(numbers) > 1:
            yield name, numbers.pop(), False
        children = list(module.children())
        same = len({type(child) for child in children}) == 1
        if isinstance(module, nn.ModuleList) and len(children) > 1 and same:
            yield name, len(children), True


def _routers(model: nn.Module, around: str, experts: str, number: int) -> list[str]:
    """The modules beside experts that have a row for each of them."""
    inside = f"{around}." if around else ""
    found: list[str] = []
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        beside = around == experts or not f"{name}.".startswith(f"{experts}.")
        if not name.startswith(inside) or not beside:
            continue
        if weight is not None and weight.dim() == 2 and weight.shape[0] == number:
            found.append(name)
    return found


def ungated(model: nn.Module, number: int, gated: Collection[str]) -> list[str]:
    """Groups of so many modules or weights that have a router beside them, as experts do, and are
    not among the experts with these names."""
    found: list[str] = []
    for experts, size, is_list in groups_of(model):
        if size != number or experts in gated:
            continue
        around = experts.rpartition(".")[0] if is_list else experts
        for _ in range(HEIGHT):
            if _routers(model, around, experts, number):
                found.append(experts)
                break
            around = around.rpartition(".")[0]
    return found


def _relative(name: str, around: str) -> str:
    return name.removeprefix(around).removeprefix(".")


def _last(model: nn.Module, experts: str, watch: _Watch) -> str | None:
    """The path in each expert to the last layer that runs; None for none."""
    last: dict[str, str] = {}
    for name in watch.order:
        place, _, path = _relative(name, experts).partition(".")
        module = model.get_submodule(name)
        if not name.startswith(f"{experts}.") or not place.isdigit():
            continue
        if kind_of(module) in LAYERS or is_in_out(module):
            last[place] = path
    return next(iter(last.values())) if len(set(last.values())) == 1 else None


def mixtures_of(model: nn.Module, example: Example) -> tuple[list[Mixture], dict[str, str]]:
    """The mixtures of a plain model, and why others are none, by the name of their experts."""
    watch = _watched(model, example)
    first = {name: place for place, name in reversed(list(enumerate(watch.order)))}
    found: list[Mixture] = []
    refused: dict[str, str] = {}
    for experts, number, is_list in groups_of(model):
        around, routers = experts if not is_list else experts.rpartition(".")[0], list[str]()
        for _ in range(HEIGHT):
            calls = _routers(model, around, experts, number) if around in first else []
            starts = [
                place for name, place in first.items() if f"{name}.".startswith(f"{experts}.")
            ]
            routers = [
                name
                for name in calls
                if name in first and (around == experts or first[name] < min(starts, default=0))
            ]
            if routers or not around:
                break
            around = around.rpartition(".")[0]
        if not routers:
            continue
        last = _last(model, experts, watch) if is_list else None
        if len(routers) > 1:
            refused[experts] = f"{routers[0]!r} or {routers[1]!r} may be its router"
        elif is_list and last is None:
            refused[experts] = "its experts do not end in one layer each"
        else:
            found.append(_mixture(model, watch, around, routers[0], experts, last, number))
    return found, refused


def _mixture(
    model: nn.Module,
    watch: _Watch,
    around: str,
    router: str,
    experts: str,
    last: str | None,
    number: int,
) -> Mixture:
    named = (vars(model.get_submodule(name)) for name in (around, router, experts))
    said = [v for of in named for k, v in of.items() if _NEEDED.match(k) and type(v) is int]
    needed = watch.topk(around, number) or [one for one in said if one <= number] or [1]
    ends = [f"{experts}.{place}.{last}".rstrip(".") for place in range(number)]
    rows = [watch.rows.get(name, []) for name in ends]
    every = last is not None and all(one == watch.rows.get(router) for one in rows)
    inside, held = (_relative(name, around) for name in (router, experts))
    return Mixture(around, inside, held, last, number, max(needed), every)
