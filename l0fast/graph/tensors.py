"""Parameters and buffers with a number for each channel that a module holds beside its layers: a
learned scale or shift, the numbers of a frozen batch norm. They get smaller with the channels."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

from torch import Tensor, nn
from torch.fx import Node

from l0fast.graph.nodes import op_name, writes_in_place

KEEPS_ZEROS = {f"aten::{name}" for name in ("mul", "mul_")}
"""Ops on a tensor and a factor that leave zeros zeros, whatever the factor is."""


def _is_per_channel(tensor: object) -> bool:
    """Whether a tensor has several numbers, along one dimension."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    return max(tensor.shape, default=1) > 1 and max(tensor.shape) == tensor.numel()


class ChannelTensor(nn.Module):
    """A tensor of a module with a number for each channel, as a layer that has this one tensor.

    Args:
        holder: the module.
        key: the tensor's name there.
    """

    def __init__(self, holder: nn.Module, key: str) -> None:
        super().__init__()
        self.place = (holder, key)  # in a tuple, the holder is no part of this module
        self.channels = self.tensor.numel()

    @property
    def owned(self) -> dict[str, Tensor | None]:
        """The dict of the holder's in which the tensor is."""
        holder, key = self.place
        all_owned = (holder._parameters, holder._buffers, vars(holder))
        return next(owned for owned in all_owned if key in owned)  # type: ignore[return-value]

    @property
    def tensor(self) -> Tensor:
        """As the holder has it now."""
        found = self.owned[self.place[1]]
        assert found is not None
        return found

    def values(self) -> Tensor:
        """float64, of the tensor's shape: its finite numbers, else NaN."""
        return self.tensor.detach().cpu().double().nan_to_num(math.nan, math.nan, math.nan)

    @property
    def sides(self) -> tuple[str, ...]:
        """The side that each dimension follows, "" for none."""
        return tuple("output" if size > 1 else "" for size in self.tensor.shape)

    def put(self, tensor: Tensor) -> None:
        """Gives the holder another tensor in its place."""
        if isinstance(self.tensor, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, self.tensor.requires_grad)
        self.owned[self.place[1]] = tensor


def channel_tensor(model: nn.Module, name: str) -> ChannelTensor | None:
    """The tensor of a name in a model, if it has a number for each channel."""
    path, _, key = name.rpartition(".")
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        return None
    tensor = {**vars(holder), **holder._parameters, **holder._buffers}.get(key)
    return ChannelTensor(holder, key) if _is_per_channel(tensor) else None


def part_of(model: nn.Module, name: str) -> nn.Module:
    """The module, or the `ChannelTensor`, of a name.

    Raises:
        AttributeError: there is none.
    """
    return channel_tensor(model, name) or model.get_submodule(name)


def channel_tensors(
    model: nn.Module,
    nodes: Iterable[Node],
    held_at: Mapping[str, str],
    is_layer: Callable[[nn.Module], bool],
) -> dict[Node, str]:
    """The nodes of an exported graph that stand for such tensors -> their names.

    Those that a layer has, that several modules share, and that the graph writes into, do not
    count.

    Args:
        model: that was exported, or a part of it.
        nodes: of its graph, or of one of its parts.
        held_at: name of a node -> name of the parameter, buffer or other tensor of a module that
            it stands for.
        is_layer: whether a module is a layer that gets smaller by itself.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers, vars(module)):
            for tensor in owned.values():
                owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    found: dict[Node, str] = {}
    for node in nodes:
        held = channel_tensor(model, held_at[node.name]) if node.name in held_at else None
        if held is None or is_layer(held.place[0]) or owners[id(held.tensor)] > 1:
            continue
        if node.users and not any(map(writes_in_place, node.users)):
            found[node] = held_at[node.name]
    return found


def added(nodes: Iterable[Node], held: Mapping[Node, str], inputs: Collection[Node]) -> set[str]:
    """Those of some tensors that do more than multiply what the model computes: what a closed unit
    leaves behind them may be another constant than zero.

    Args:
        nodes: of an export.
        held: those that stand for such tensors.
        inputs: those that stand for the model's inputs.
    """
    fixed: dict[Node, set[str]] = {}
    """Node that depends on no input of the model -> the tensors that it depends on."""
    found: set[str] = set()
    for node in nodes:
        sources = node.all_input_nodes
        names = {name for source in sources for name in fixed.get(source, ())}
        if node in held:
            fixed[node] = {held[node]}
        elif node not in inputs and all(source in fixed for source in sources):
            fixed[node] = names
        elif op_name(node) not in KEEPS_ZEROS:
            found |= names
    return found
