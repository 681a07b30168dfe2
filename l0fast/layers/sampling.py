"""Sampling the gates of a whole model: by one op, at the start of its forward."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from l0fast import autograd, functional
from l0fast.layers.draw import Board, Draw, Drawn, OpenCounts, all_open
from l0fast.layers.handle import ModelGates, gates
from l0fast.layers.hooks import remove_hooks
from l0fast.layers.stages import DRAWN, OPEN, QUIET
from l0fast.layers.ties import ATTRIBUTE, attach_ties, detach_ties
from l0fast.maths.hard_concrete import HardConcrete


def _drawn_outside(layer: Drawn, board: Board) -> bool:
    """Whether an outer model of this one has drawn for a layer already."""
    return any(
        other is not board and other.latest.live and other.latest.z[place] is not None
        for other, place in layer._places
    )


def draw_gates(model: nn.Module, _inputs: Any = None) -> None:
    """Forward pre-hook: samples the gates of all the model's layers in one op."""
    if getattr(model, "_is_replica", False):  # of nn.DataParallel: its layers draw their own
        return
    if model.training and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func: got a transform of a training step; expected plain autograd, or a model "
            "in evaluation: gates are drawn once for a whole step"
        )
    handle: ModelGates = model.__dict__[ATTRIBUTE]
    board = handle.board
    # By distribution, device and dtype: each log_alpha, and the layers that share it.
    groups: dict[Any, dict[int, tuple[Tensor, list[int]]]] = {}
    members: dict[int, tuple[Tensor, list[int]]] = {}
    last: Any = None, None, None
    for place, layer in enumerate(handle._drawn):
        if not layer.training or layer.noise == "example" or layer.gates == "weight":
            continue
        if len(layer._places) > 1 and _drawn_outside(layer, board):
            continue
        log_alpha = layer.log_alpha
        key = layer.drawn_from, log_alpha.device, log_alpha.dtype, layer.stage
        if key[0] is not last[0] or key[1:] != last[1:]:  # hashing it costs more than all else here
            members, last = groups.setdefault(key, {}), key
        members.setdefault(id(log_alpha), (log_alpha, []))[1].append(place)
    if not groups:
        return
    earlier = [] if torch.compiler.is_compiling() else board.latest.waiting()
    board.latest = draw = Draw(len(handle._drawn), True, earlier)
    for (distribution, _, _, stage), members in groups.items():
        log_alphas, sharing = zip(*members.values(), strict=True)
        _draw_group(handle, draw, log_alphas, sharing, distribution, stage)


def _gates(
    log_alphas: tuple[Tensor, ...], distribution: HardConcrete, stage: str
) -> tuple[Tensor, Tensor | None]:
    """The gates of layers, end to end [N], and how many of each are expected to be open [L].

    Half precision is drawn in float32. Without noise nothing is counted.
    """
    if stage != OPEN and autograd.lie_apart(log_alphas):
        state = functional.fresh_state(log_alphas[0].device) if stage in (DRAWN, QUIET) else None
        return autograd.draw_apart(log_alphas, state, distribution)
    flat = torch.cat(log_alphas)
    work = flat.float() if flat.dtype in (torch.float16, torch.bfloat16) else flat
    if stage in (DRAWN, QUIET):
        sizes = tuple(log_alpha.numel() for log_alpha in log_alphas)
        return functional.draw(work, sizes, distribution)
    return (all_open(work) if stage == OPEN else distribution.median(work)), None


def _draw_group(
    handle: ModelGates,
    draw: Draw,
    log_alphas: tuple[Tensor, ...],
    sharing: tuple[list[int], ...],
    distribution: HardConcrete,
    stage: str,
) -> None:
    """Samples the gates of one group, and puts them and their counts on the board."""
    layers = handle._drawn
    z, totals = _gates(log_alphas, distribution, stage)
    if totals is not None:  # else the same in every forward, and with nothing to count
        if not torch.compiler.is_compiling() and totals.grad_fn is not None:
            draw.nodes.append(weakref.ref(totals.grad_fn))
        counts = OpenCounts(totals)
        for index, places in enumerate(sharing):
            for place in places:
                layers[place]._count(counts, index)
    sizes = tuple(log_alpha.numel() for log_alpha in log_alphas)
    for places, part in zip(sharing, z.split(sizes), strict=True):
        for place in places:
            draw.z[place] = part
            if len(layers[place]._places) > 1:
                _outdate(layers[place], handle.board)
    if handle.skipping is not None and not torch.compiler.is_compiling():
        draw.parts.append((z, sizes, [[layers[place] for place in places] for places in sharing]))


def _outdate(layer: Drawn, board: Board) -> None:
    """Drops what the other models of this layer drew for it."""
    for other, place in layer._places:
        if other is not board:
            other.latest.z[place] = None


def release_gates(model: nn.Module, _inputs: Any = None, _output: Any = None) -> None:
    """Forward hook: the model's draw is over; a layer called outside a forward draws its own."""
    handle: ModelGates = model.__dict__[ATTRIBUTE]
    handle.board.latest.live = False
    handle.board.latest.parts = []


def attach_draw(model: nn.Module) -> ModelGates:
    """Makes `model` draw the gates of all its layers at the start of its forward."""
    handle = gates(model)
    if draw_gates not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(draw_gates)
        model.register_forward_hook(release_gates, always_call=True)
    attach_ties(model)
    return handle


def detach(model: nn.Module) -> None:
    """Takes the handles and their hooks off a model and all inside it."""
    for module in model.modules():
        handle = module.__dict__.pop(ATTRIBUTE, None)
        if handle is not None:
            handle._leave(handle.board)
        detach_ties(module)
        remove_hooks(module, lambda hook: hook is draw_gates or hook is release_gates)
