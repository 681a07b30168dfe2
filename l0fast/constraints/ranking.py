"""How much each unit matters, by the magnitude of the weights behind its gate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from l0fast.graph.sharding import full
from l0fast.layers.dense_types import inputs_first
from l0fast.layers.gated import Gated
from l0fast.layers.handle import sharing
from l0fast.layers.part import PartGate
from l0fast.layers.rms_norm import GatedRMSNorm


def magnitudes(layer: Gated) -> Tensor:
    """The root mean square of the parameters that each of its gates controls.

    Within a layer it ranks units as the L2 norm of their weights does. Of a single weight it is the
    absolute value.
    """
    if isinstance(layer, GatedRMSNorm):  # it does not see what else its gates control
        return full(layer.factors()).abs()
    squares = full(layer.weight.detach()).square()
    if layer.gates == "weight":
        return squares.sqrt()
    if layer.gates == ("input" if inputs_first(layer) else "output"):
        units = squares.flatten(1).sum(1)
    else:
        by_column = squares.flatten(2).sum(2) if squares.dim() > 2 else squares
        # In each group of a convolution, the columns are those of that group.
        groups = getattr(layer, "groups", 1)
        units = by_column.unflatten(0, (groups, -1)).sum(1).flatten()
    if layer.gates == "output" and layer.bias is not None:
        units = units + full(layer.bias.detach()).square()
    return (units.view(-1, layer.units).sum(1) / layer.group_size).sqrt()


def shared_magnitudes(layers: Mapping[str, Gated]) -> dict[str, Tensor]:
    """Name of each layer with gates of its own -> their magnitudes, over all that share them; not
    of gates on branches and experts, which cannot be compared so."""
    found: dict[str, Tensor] = {}
    for owner, readers in sharing(layers).items():
        if isinstance(layers[owner], PartGate):
            continue
        gates = layers[owner].log_alpha
        squares = [magnitudes(layer).square() * layer.group_size for layer in readers.values()]
        wide = torch.promote_types(squares[0].dtype, torch.float32)
        total, sizes = torch.zeros(2, gates.numel(), dtype=wide, device=squares[0].device)
        for layer, part in zip(readers.values(), squares, strict=True):
            places = layer.places().to(total.device)
            total.index_add_(0, places, part.flatten().to(wide))
            sizes.index_add_(0, places, torch.full_like(part.flatten(), layer.group_size).to(wide))
        found[owner] = (total / sizes).sqrt().view(gates.shape)
    return found


def scores(squares: Tensor) -> Tensor:
    """How late each unit of a layer goes, in [0, 1], comparable between layers; of its shape.

    Equals:
        squares[u] / squares[squares >= squares[u]].sum()
    the share of what would be left of the layer if it went next: the last one has 1. Ranked by the
    norms alone, whole layers but for one unit go, as layers are of different scales.

    Source: Lee, Park, Mo, Ahn, Shin, 2021 (LAMP), of single weights; here of units, too.
    """
    wide = torch.promote_types(squares.dtype, torch.float32)
    ordered, places = squares.flatten().to(wide).sort()
    left = ordered.flip(0).cumsum(0).flip(0)
    found = torch.empty_like(ordered)
    found[places] = ordered / left.clamp_min(torch.finfo(left.dtype).tiny)
    return found.view(squares.shape)
