"""Smaller ordinary layers: rows and columns left out, with a gather before and a scatter after.

All that comes out is plain PyTorch: the layer's own class, and where a gather or scatter is needed
an nn.Sequential around it with tiny torch.fx modules, which copy, pickle, compile and export.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from l0fast.graph.capture import is_carrier, is_rms_norm, layer_size, resize_
from l0fast.graph.sites import replace
from l0fast.graph.tensors import ChannelTensor, part_of
from l0fast.layers.dense_types import inner_dims, inputs_first, is_in_out, kind_of
from l0fast.layers.rms_norm import without_channels_
from l0fast.pruning.views import Patch

_SIDES = ("input", "output")


@dataclass(frozen=True)
class Edit:
    """How one layer of a dense model gets smaller; as JSON, one entry of the recipe."""

    name: str
    kind: str
    """Class of the layer."""
    size: tuple[int, int]
    """Its dense (inputs, outputs)."""
    inputs: tuple[int, ...] | None = None
    """Inputs that stay, None for all."""
    outputs: tuple[int, ...] | None = None
    """Outputs that stay, None for all."""
    gather: tuple[tuple[int, ...], int] | None = None
    """(positions to take, of how many that arrive)."""
    scatter: tuple[tuple[int, ...], int] | None = None
    """(positions to fill, of how many that leave); the others are zeros."""
    scale: str | None = None
    """"input" or "output": a factor for each unit there, where a tied weight cannot hold it."""

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes; "in" and "out" are [kept, of]."""
        inputs, outputs = self.inputs, self.outputs
        return {
            "name": self.name,
            "kind": self.kind,
            "in": [self.size[0] if inputs is None else len(inputs), self.size[0]],
            "out": [self.size[1] if outputs is None else len(outputs), self.size[1]],
            "inputs": None if inputs is None else list(inputs),
            "outputs": None if outputs is None else list(outputs),
            "gather": None if self.gather is None else [list(self.gather[0]), self.gather[1]],
            "scatter": None if self.scatter is None else [list(self.scatter[0]), self.scatter[1]],
            "scale": self.scale,
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Edit:
        """The edit of a recipe's entry.

        Raises:
            ValueError, TypeError, KeyError: it is not one.
        """

        def indices(values: Any, size: int) -> tuple[int, ...]:
            found = tuple(int(value) for value in values)
            if any(type(value) is not int for value in values):
                raise TypeError("an index that is no whole number")
            if not found or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] >= size:
                raise ValueError(f"indices outside [0, {size})")
            return found

        def part(values: Any, size: int) -> tuple[int, ...] | None:
            return None if values is None else indices(values, size)

        def move(value: Any, size: int) -> tuple[tuple[int, ...], int] | None:
            if value is None:
                return None
            of = int(value[1])
            if of > size:
                raise ValueError(f"{of} units of a layer that has {size}")
            return indices(value[0], of), of

        size = int(entry["in"][1]), int(entry["out"][1])
        edit = cls(
            str(entry["name"]),
            str(entry["kind"]),
            size,
            part(entry["inputs"], size[0]),
            part(entry["outputs"], size[1]),
            move(entry["gather"], size[0]),
            move(entry["scatter"], size[1]),
            entry["scale"],
        )
        fits = all(
            move is None or len(move[0]) == kept
            for move, kept in ((edit.gather, entry["in"][0]), (edit.scatter, entry["out"][0]))
        )
        if not fits or edit.as_json() != dict(entry) or edit.scale not in (None, *_SIDES):
            raise ValueError("an entry that contradicts itself")
        return edit


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's inputs and outputs that its channels lie along, < 0."""
    return -1 - (inner_dims(layer) or 0)


def _module(name: str, tensors: dict[str, Tensor], build: Any) -> fx.GraphModule:
    """A module of one tensor input, from a function that writes its graph."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("input")))
    return fx.GraphModule(tensors, graph, class_name=name)


def gather(index: Tensor, dim: int) -> fx.GraphModule:
    """y = index_select(x, dim, index), for any number of dimensions before and after (dim < 0)."""
    return _module(
        "Gather",
        {"index": index},
        lambda graph, x: graph.call_function(torch.index_select, (x, dim, graph.get_attr("index"))),
    )


def scatter(positions: Tensor, size: int, dim: int) -> fx.GraphModule:
    """y, of `size` along `dim`, holds x at `positions` and zeros elsewhere."""
    # One zero is put behind x, and every other position reads it.
    index = torch.full((size,), len(positions), dtype=torch.int64, device=positions.device)
    index[positions] = torch.arange(len(positions), device=positions.device)
    widths = (0, 0) * (-dim - 1) + (0, 1)

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        padded = graph.call_function(F.pad, (x, widths))
        return graph.call_function(torch.index_select, (padded, dim, graph.get_attr("index")))

    return _module("Scatter", {"index": index}, build)


def scale(z: Tensor, dim: int) -> fx.GraphModule:
    """y = x * z, with z along `dim` < 0."""
    factor = z.reshape(-1, *[1] * (-dim - 1))
    return _module(
        "Scale",
        {"factor": factor},
        lambda graph, x: graph.call_function(torch.mul, (x, graph.get_attr("factor"))),
    )


def weight_sides(layer: nn.Module) -> tuple[str, ...]:
    """The sides ("input", "output") of a layer that the first dimensions of its weight follow; of a
    carrier, which keeps or loses whole groups, only the first."""
    if isinstance(layer, ChannelTensor):
        return layer.sides
    sides = _SIDES if inputs_first(layer) or isinstance(layer, nn.Embedding) else _SIDES[::-1]
    return sides[:1] if is_carrier(layer) else sides


def sliced(value: Tensor, edit: Edit, sides: Sequence[str]) -> Tensor:
    """What an edit leaves of a tensor of its layer, or of one shaped like it; a copy in the same
    layout.

    Args:
        value: a weight, [out], or a number.
        edit: of the layer.
        sides: see `weight_sides`.
    """
    if value.dim() < 2:
        sides = ("output",)[: value.dim()]
    parts = {"input": edit.inputs, "output": edit.outputs}
    keep = [parts.get(side) for side in sides]
    last = value.dim() == 4 and not value.is_contiguous()
    last = last and value.is_contiguous(memory_format=torch.channels_last)
    for dim, index in enumerate(keep):
        if index is not None:
            value = value.index_select(dim, torch.tensor(index, device=value.device))
    layout = torch.channels_last if last else torch.contiguous_format
    return value.clone(memory_format=layout)


def shrink_(small: Any, edit: Edit) -> None:
    """Slices a layer, in place, and sets the attributes that say its size."""
    if edit.outputs is not None and is_rms_norm(small):
        without_channels_(small, torch.tensor(edit.outputs))
        return
    sides = weight_sides(small)
    for owned in (small._parameters, small._buffers):
        for name, value in owned.items():
            if value is None:
                continue
            part = sliced(value.detach(), edit, sides)
            if isinstance(value, nn.Parameter):
                part = nn.Parameter(part, value.requires_grad)
            owned[name] = part
    parts = zip((edit.inputs, edit.outputs), layer_size(small), strict=True)
    resize_(small, *(size if part is None else len(part) for part, size in parts))


def in_dtype(layer: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A layer with the same attributes and hooks, whose floating tensors are in `dtype`, or the
    very same for None; the layer stays as it is. Of a subclass, the dense layer that it is."""
    twin: nn.Module = object.__new__(kind_of(layer))
    for key, value in vars(layer).items():
        twin.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
    for owned in (twin._parameters, twin._buffers):
        for key, value in owned.items():
            if dtype is None or value is None or not value.is_floating_point():
                continue
            wide = value.data.to(dtype)
            new = nn.Parameter(wide, value.requires_grad) if key in twin._parameters else wide
            owned[key] = new  # type: ignore[assignment]
    return twin


def _fold(layer: Any, constants: Tensor) -> None:
    """Adds what constant inputs give to a copy's bias, which becomes a new parameter."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach()
    given = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    given = given.t() if is_in_out(layer) else given
    folded = (bias.double() + given @ constants.to(weight.device)).to(bias.dtype)
    layer._parameters["bias"] = nn.Parameter(folded, layer.bias.requires_grad)


def edited(
    layer: nn.Module, edit: Edit, factor: Tensor | None = None, constants: Tensor | None = None
) -> nn.Module:
    """The ordinary module that an edit makes of a layer; the layer stays as it is.

    Args:
        layer: one that can be made smaller.
        edit: made for it; a convolution in groups keeps or loses whole groups.
        factor: what `edit.scale` multiplies its units with, [units]; ones by default.
        constants: [in], of inputs that the edit leaves out: the bias takes what they give.
    """
    small = in_dtype(layer, None)
    weight = layer._parameters.get("weight")
    device = None if weight is None else weight.device

    if constants is not None and bool(constants.any()):
        _fold(small, constants)
    if edit.inputs is not None or edit.outputs is not None:
        shrink_(small, edit)
    parts: OrderedDict[str, nn.Module] = OrderedDict(layer=small)
    if edit.gather is not None:
        parts["gather"] = gather(torch.tensor(edit.gather[0], device=device), channel_dim(layer))
        parts.move_to_end("gather", last=False)
    if edit.scatter is not None:
        filled = torch.tensor(edit.scatter[0], device=device)
        parts["scatter"] = scatter(filled, edit.scatter[1], channel_dim(layer))
    if edit.scale is not None and weight is not None:
        units = edit.size[edit.scale == "output"]
        z = torch.ones(units) if factor is None else factor.detach()
        parts["scale"] = scale(z.to(weight), channel_dim(layer))
        parts.move_to_end("scale", last=edit.scale == "output")
    return small if len(parts) == 1 else nn.Sequential(parts).train(layer.training)


def apply(model: nn.Module, edits: list[Edit], patches: Iterable[Patch] = ()) -> nn.Module:
    """Makes layers smaller and carries patches out, in place; returns the root.

    Args:
        model: of full size.
        edits, patches: to carry out.
    """
    for patch in patches:
        patch.apply(model)
    layers: dict[int, nn.Module] = {}
    for edit in edits:
        layer = part_of(model, edit.name)
        if isinstance(layer, ChannelTensor):
            layer.put(sliced(layer.tensor.detach(), edit, layer.sides))
        else:
            layers[id(layer)] = edited(layer, edit)
    return replace(model, layers)
