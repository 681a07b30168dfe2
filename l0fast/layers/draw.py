"""One draw for a whole model: all its gates are sampled, and counted, as its forward starts."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import functional
from l0fast.layers.drawn import NOT_DRAWN, Draw, Drawn
from l0fast.layers.hooks import remove_hooks
from l0fast.layers.ties import attach_ties, detach_ties

_MEMBERS = "_l0fast_gated"
"""Attribute of a model that draws: its gated layers, so that no step has to look for them."""
SKIPPING = "_l0fast_skipping"
"""Attribute of a model that draws: which closed units a step leaves out (see `skipping`)."""


def gated_layers(model: nn.Module) -> dict[str, Any]:
    """Name -> gated layer, in the model's order, each layer once."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Drawn)}


def gate_owners(layers: Mapping[str, Any]) -> dict[str, str]:
    """Name of each gated layer -> the first of those that share its gates, perhaps itself."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(layer.log_alpha), name) for name, layer in layers.items()}


def own_gates(layers: Mapping[str, Any]) -> list[str]:
    """The names of the gated layers whose gates are not those of an earlier one."""
    return list(dict.fromkeys(gate_owners(layers).values()))


def _members(model: nn.Module) -> list[Drawn]:
    """The layers that the model draws for; one put into it since then draws its own gates."""
    return model.__dict__.get(_MEMBERS, [])


def draw_gates(model: nn.Module, inputs: Any = (), options: Any = None) -> None:
    """Forward pre-hook: samples the gates of all the model's layers in one op."""
    # By distribution, device and dtype: each log_alpha, and the layers that share it.
    groups: dict[Any, dict[int, tuple[Tensor, list[Drawn]]]] = {}
    members: dict[int, tuple[Tensor, list[Drawn]]] = {}
    last: Any = None, None, None
    for layer in _members(model):
        if not layer.training or layer.noise == "example" or layer.gates == "weight":
            continue
        drawn = layer._drawn[1]
        if drawn.live and drawn.owner != id(model):
            continue  # an outer model of this one has drawn already
        log_alpha = layer.log_alpha
        key = layer.distribution, log_alpha.device, log_alpha.dtype, layer.settled
        if key[0] is not last[0] or key[1:] != last[1:]:  # hashing it costs more than all else here
            members, last = groups.setdefault(key, {}), key
        members.setdefault(id(log_alpha), (log_alpha, []))[1].append(layer)
    opened: dict[int, Tensor] = {}
    skip = None if torch.compiler.is_compiling() else model.__dict__.get(SKIPPING)
    draw = NOT_DRAWN[1]
    if skip is not None:
        skip.clear(model)  # a forward that was interrupted leaves its own behind
    for (distribution, _, dtype, settled), members in groups.items():
        draw = Draw(id(model))
        log_alphas, layers = zip(*members.values(), strict=True)
        sizes = tuple(log_alpha.numel() for log_alpha in log_alphas)
        flat = torch.cat(log_alphas)
        work = flat.float() if dtype in (torch.float16, torch.bfloat16) else flat
        if settled:  # the same in every forward, and with nothing to count
            z = distribution.median(work)
        else:
            z, totals = functional.draw(work, sizes, distribution)
            if not torch.compiler.is_compiling() and totals.grad_fn is not None:
                for earlier in {layer._drawn[1] for sharing in layers for layer in sharing}:
                    draw.earlier += earlier.waiting()
                draw.node = weakref.ref(totals.grad_fn)
            draw.count(totals, layers)
        for sharing, part in zip(layers, z.split(sizes), strict=True):
            for layer in sharing:
                # Past nn.Module's own setattr, which looks for parameters: this is each step's
                # cost.
                layer.__dict__["_drawn"] = part, draw
                layer.__dict__["_counted"] = draw
                layer.__dict__["_compact"] = None
        if skip is not None:
            parts = (z > 0).split(sizes)
            for sharing, part in zip(layers, parts, strict=True):
                for layer in sharing:
                    opened[id(layer)] = layer.spread(part)
    if skip is not None and opened:
        skip.assign(opened, inputs, options or {}, draw)


def release_gates(model: nn.Module, _inputs: Any = None, _output: Any = None) -> None:
    """Forward hook: the model's draw is over; a layer called outside a forward draws its own."""
    for layer in _members(model):
        draw = layer._drawn[1]
        if draw.owner == id(model):
            draw.live = False


def attach_draw(model: nn.Module) -> None:
    """Makes `model` draw the gates of all its layers at the start of its forward."""
    model.__dict__[_MEMBERS] = list(gated_layers(model).values())
    if draw_gates not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(draw_gates, with_kwargs=True)
        model.register_forward_hook(release_gates, always_call=True)
    attach_ties(model)


def detach_draw(model: nn.Module) -> None:
    """Undoes `attach_draw`, on the model and all inside it."""
    for module in model.modules():
        module.__dict__.pop(_MEMBERS, None)
        detach_ties(module)
        remove_hooks(module, lambda hook: hook is draw_gates or hook is release_gates)


@functools.lru_cache(maxsize=64)
def _index(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)


def expected_open(layers: list[Any]) -> Tensor:
    """[L] expected number of open gates of each layer, differentiable.

    The counts that came with this training step's draw are handed out once, so that their
    gradient joins the gates' own backward; any other is computed from log_alpha.
    """
    draws = [layer._counted for layer in layers]
    taken = {draw: draw.take() for draw in set(draws)}
    places = [
        None if taken[draw] is None else draw.place(layer)
        for layer, draw in zip(layers, draws, strict=True)
    ]
    if len(taken) == 1 and None not in places:
        (totals,) = taken.values()
        assert totals is not None
        if places == list(range(totals.numel())):
            return totals.view(-1)
        return totals.view(-1).index_select(0, _index(tuple(places), totals.device))
    parts: list[Tensor] = []
    for layer, draw, place in zip(layers, draws, places, strict=True):
        totals = taken[draw]
        if totals is None or place is None:
            dtype = torch.promote_types(layer.log_alpha.dtype, torch.float32)
            parts.append(layer.open_probability().sum(dtype=dtype))
        else:
            parts.append(totals.view(-1)[place])
    return torch.stack(parts)
