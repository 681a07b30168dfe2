"""Layers without gates of their own that leave out what their neighbours' gates close."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import functional
from l0fast.graph.capture import LAYERS, NORMS
from l0fast.layers.draw import SKIPPING
from l0fast.layers.drawn import Compact, Draw, OnDevice, in_force

_CONVOLVE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Following:
    """The forward of a layer without gates, between or beside some with: it leaves out the same.

    A batch norm, or a depthwise convolution, then computes with the channels that arrive; the
    running statistics of the others stay as they are.

    Args:
        layer: a Linear, a convolution or a batch norm; this stands in for its forward.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer
        self.compact: Compact | OnDevice | None = None
        self.draw: Draw | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layer": self.layer, "compact": None, "draw": None}

    def __call__(self, x: Tensor) -> Tensor:
        layer, compact = self.layer, self.compact
        if compact is None or self.draw is None or not in_force(self.draw):
            return type(layer).forward(layer, x)
        if isinstance(compact, OnDevice):
            return functional.skipping_linear(x, layer.weight, layer.bias, **compact._asdict())
        if passes_on(layer):
            assert compact.cols is not None
            return (self._norm if isinstance(layer, NORMS) else self._depthwise)(x, compact.cols)
        rows, cols, gather = compact
        weight, bias = layer.weight, layer.bias
        if rows is not None:
            weight = weight.index_select(0, rows)
            bias = None if bias is None else bias.index_select(0, rows)
        if cols is not None:
            weight = weight.index_select(1, cols)
        if gather is not None:
            x = x.index_select(1 - weight.dim(), gather)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return layer._conv_forward(x, weight, bias)

    def _depthwise(self, x: Tensor, channels: Tensor) -> Tensor:
        layer = self.layer
        weight = layer.weight.index_select(0, channels)
        bias = None if layer.bias is None else layer.bias.index_select(0, channels)
        how = layer.stride, layer.padding, layer.dilation, len(channels)
        return _CONVOLVE[type(layer)](x, weight, bias, *how)

    def _norm(self, x: Tensor, channels: Tensor) -> Tensor:
        norm = self.layer
        mean = norm.running_mean.index_select(0, channels)
        variance = norm.running_var.index_select(0, channels)
        weight, bias = (
            None if parameter is None else parameter.index_select(0, channels)
            for parameter in (norm.weight, norm.bias)
        )
        y = F.batch_norm(x, mean, variance, weight, bias, norm.training, norm.momentum, norm.eps)
        if norm.training:
            norm.num_batches_tracked.add_(1)
            norm.running_mean.index_copy_(0, channels, mean)
            norm.running_var.index_copy_(0, channels, variance)
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
    if type(layer) in NORMS:
        norm: Any = layer
        return norm.running_mean is not None and norm.momentum is not None
    return type(layer) in LAYERS and (getattr(layer, "groups", 1) == 1 or passes_on(layer))


def stop_following(model: nn.Module) -> None:
    """Makes a model, and each part of it, compute with all units; layers get their own forward."""
    for module in model.modules():
        module.__dict__.pop(SKIPPING, None)
        if isinstance(module.__dict__.get("forward"), Following):
            del module.__dict__["forward"]
