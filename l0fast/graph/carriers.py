"""What layers that pass units on make of them: norms, slopes, and convolutions in groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.capture import NORMS, groups_of, is_channelwise, is_rms_norm
from l0fast.graph.sites import Site
from l0fast.graph.units import Ties, Units, unknown


def _normed(layer: Any, constant: Tensor) -> Tensor:
    """What a batch norm makes of constants in evaluation."""
    weight = 1.0 if layer.weight is None else layer.weight.detach().cpu().double()
    bias = 0.0 if layer.bias is None else layer.bias.detach().cpu().double()
    mean, variance = layer.running_mean.cpu().double(), layer.running_var.cpu().double()
    scale = weight / (variance + layer.eps).sqrt()
    return (constant - mean) * scale + bias


def passed_on(site: Site, units: Units, ties: Ties, untold: bool) -> tuple[Tensor, Tensor]:
    """The units that a carrier's outputs are, and their constants, as vectors.

    Args:
        site: of the carrier.
        units: along its inputs.
        ties: where the units of a group are tied: they vanish together.
        untold: nothing is to be known of the constants that its parameters give.
    """
    layer: Any = site.layer
    nothing = unknown((len(site.writes),)).constant
    if isinstance(layer, NORMS):
        return units.labels, nothing if untold else _normed(layer, units.constant)
    if is_rms_norm(layer):
        constant = torch.where(units.constant == 0, 0.0, nothing)
        return units.labels, torch.where(site.writes, constant, 0.0)
    if isinstance(layer, nn.PReLU):
        return units.labels, torch.where(units.constant == 0, 0.0, nothing)
    if getattr(layer, "running_mean", None) is not None:  # an InstanceNorm that has counted
        return units.labels, nothing
    number = groups_of(layer)
    groups = units.labels.view(number, -1)
    ties.tie(groups, groups[:, :1], f"the groups of {site.name!r}")
    # Outputs of silent inputs are their biases.
    silent = (units.constant == 0).view(number, -1).all(1)
    bias = nothing if layer.bias is not None and untold else site.bias()
    repeats = len(site.writes) // number
    constant = torch.where(silent.repeat_interleave(repeats), bias, nothing)
    if is_channelwise(layer):
        return units.labels, constant
    return groups[:, 0].repeat_interleave(repeats), torch.where(site.writes, constant, 0.0)
