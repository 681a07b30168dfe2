"""Layers without gates of their own that leave out what their neighbours' gates close."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import functional
from l0fast.graph.capture import NORMS
from l0fast.layers.draw import Compact, Draw, OnDevice, in_force
from l0fast.layers.hooks import OwnHook, remove_hooks

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Following(OwnHook):
    """Pre-hook of a layer without gates, between or beside some with: it leaves out the same.

    The layer and its parameters stay as they are. Its own forward is given an `Arriving` instead of
    the input, and where it hands that to a function of PyTorch, less is computed. Whatever
    interrupts the forward, there is nothing to put back.

    Attributes:
        compact: what the layer leaves out in this step; None: nothing.
        draw: the draw that says so.
    """

    def __init__(self) -> None:
        self.compact: Compact | OnDevice | None = None
        self.draw: Draw | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"compact": None, "draw": None}  # of one step of one model, as `Drawn` has it

    def __call__(
        self, layer: Any, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        compact = self.compact
        if compact is None or self.draw is None or not in_force(self.draw):
            return None
        (x,) = (*args, *options.values())
        if isinstance(compact, Compact) and compact.gather is not None:
            x = x.index_select(1 - layer.weight.dim(), compact.gather)
        return (Arriving(x, compact),), {}


class Arriving:
    """The input of a layer that leaves out channels: those that it reads.

    Layers hand their input, weight and bias to F.linear, F.conv* or F.batch_norm. PyTorch passes
    such a call on to the `__torch_function__` of an argument that has one: here it is computed with
    the channels that are there.
    """

    __slots__ = ("compact", "x")

    def __init__(self, x: Tensor, compact: Compact | OnDevice) -> None:
        self.x, self.compact = x, compact

    def dim(self) -> int:
        """As the input's: batch norms check it."""
        return self.x.dim()

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Any:
        (arriving, *others), options = args, options or {}
        x, compact = arriving.x, arriving.compact
        if function is F.pad:  # a convolution's, if it does not pad with zeros
            return cls(F.pad(x, *others, **options), compact)
        if isinstance(compact, OnDevice):
            return functional.skipping_linear(x, *others, **compact._asdict())
        if function is F.batch_norm:
            return _norm(compact, x, *others, **options)
        if function is F.linear:
            return F.linear(x, *_picked(compact.rows, compact.cols, *others))
        if function in _CONVOLVE.values():
            return _convolution(function, compact, x, *others)
        return NotImplemented


def _picked(
    rows: Tensor | None, cols: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of some outputs and inputs; None: of all."""
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if cols is not None:
        weight = weight.index_select(1, cols)
    return weight, bias


def _convolution(
    function: Callable[..., Tensor],
    compact: Compact,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *how: Any,
) -> Tensor:
    """A convolution of one group, or a depthwise one of the channels that arrive."""
    rows, cols, _ = compact
    if how[-1] == 1:
        return function(x, *_picked(rows, cols, weight, bias), *how)
    assert cols is not None
    return function(x, *_picked(cols, None, weight, bias), *how[:-1], len(cols))


def _norm(
    compact: Compact,
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """A batch norm of the channels that arrive; the others' running statistics stay."""
    channels = compact.cols
    assert channels is not None
    mean = running_mean.index_select(0, channels)
    variance = running_var.index_select(0, channels)
    weight, bias = (
        None if parameter is None else parameter.index_select(0, channels)
        for parameter in (weight, bias)
    )
    y = F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)
    if training:
        running_mean.index_copy_(0, channels, mean)
        running_var.index_copy_(0, channels, variance)
    return y


def passes_on(layer: nn.Module) -> bool:
    """Whether it is a batch norm or a depthwise convolution: channels go through it one by one."""
    if isinstance(layer, NORMS):
        return True
    groups = getattr(layer, "groups", 1)
    one_by_one = groups > 1 and groups == layer.in_channels == layer.out_channels
    return one_by_one and type(layer) in _CONVOLVE and layer.padding_mode == "zeros"


def can_follow(layer: nn.Module) -> bool:
    """Whether a layer without gates can leave out channels."""
    if isinstance(layer, nn.SyncBatchNorm):  # each process has other units open
        return False
    if type(layer) in NORMS:
        norm: Any = layer
        return norm.running_mean is not None and norm.momentum is not None
    return type(layer) in (nn.Linear, *_CONVOLVE) and (
        getattr(layer, "groups", 1) == 1 or passes_on(layer)
    )


def follow(layer: nn.Module) -> Following:
    """Makes a layer without gates leave out what the `Following` that is returned says."""
    following = Following()
    layer.register_forward_pre_hook(following, with_kwargs=True)
    return following


def stop_following(model: nn.Module) -> None:
    """Makes a model, and each part of it, compute with all units."""
    for module in model.modules():
        remove_hooks(module, lambda hook: isinstance(hook, Following))
