"""Parameters and buffers with a number for each channel that a module holds beside its layers: a
learned scale or shift, the numbers of a frozen batch norm, a table of relative positions with a
column for each head. They get smaller with the channels. So do tensors of one number that a module
makes as wide as an attribute says, and the weights of recurrent layers' inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from l0fast.graph.nodes import op_name, shape_of, writes_in_place
from l0fast.graph.recurrent import INPUT_WEIGHTS, input_weights

KEEPS_ZEROS = {f"aten::{name}" for name in ("mul", "mul_")}
"""Ops on a tensor and a factor that leave zeros zeros, whatever the factor is."""


FILLS = {f"aten::{name}" for name in ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")}
"""Ops that fill a new tensor with one number."""


def _is_per_channel(tensor: object) -> bool:
    """Whether a tensor has several numbers, along one dimension."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        return False
    return max(tensor.shape, default=1) > 1 and max(tensor.shape) == tensor.numel()


def _is_table(tensor: object) -> bool:
    """Whether a tensor may be a table, with a column for each channel."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() != 2:
        return False
    return min(tensor.shape) > 1


def _picks_rows(node: Node, of: Node) -> bool:
    """Whether an op only picks rows of a table."""
    if op_name(node) == "aten::embedding":
        return node.args[0] is of and not any(node.args[3:])
    return op_name(node) == "aten::index" and node.args[0] is of and len(node.args[1]) == 1  # type: ignore[arg-type]


class ChannelTensor(nn.Module):
    """A tensor of a module with a number for each channel, or a table with a column for each, as a
    layer that has this one tensor.

    Args:
        holder: the module.
        key: the tensor's name there.
    """

    def __init__(self, holder: nn.Module, key: str) -> None:
        super().__init__()
        self.place = (holder, key)  # in a tuple, the holder is no part of this module
        self.is_table = _is_table(self.tensor)
        self.channels = self.tensor.shape[1] if self.is_table else self.tensor.numel()

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

    def over(self, channels: Tensor) -> Tensor:
        """What each channel has, for each number of the tensor."""
        shape = self.tensor.shape
        return channels.expand(shape) if self.is_table else channels.view(shape)

    def values(self) -> Tensor:
        """float64, of the tensor's shape: its finite numbers, else NaN; of a table, NaN."""
        if self.is_table:
            return torch.tensor(math.nan, dtype=torch.float64).expand(self.tensor.shape)
        return self.tensor.detach().cpu().double().nan_to_num(math.nan, math.nan, math.nan)

    @property
    def sides(self) -> tuple[str, ...]:
        """The side that each dimension follows, "" for none."""
        if self.is_table:
            return ("", "output")
        return tuple("output" if size > 1 else "" for size in self.tensor.shape)

    def put(self, tensor: Tensor) -> None:
        """Gives the holder another tensor in its place."""
        if isinstance(self.tensor, nn.Parameter) and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, self.tensor.requires_grad)
        self.owned[self.place[1]] = tensor
        if isinstance(self.place[0], nn.Embedding):
            self.place[0].embedding_dim = tensor.shape[1]


class InputWeight(ChannelTensor):
    """The weight by which an RNN, GRU or LSTM reads its input, [out, in], as a layer that reads it
    and gives nothing that could go."""

    @property
    def sides(self) -> tuple[str, ...]:
        """The second dimension follows the inputs."""
        return ("", "input")

    def put(self, tensor: Tensor) -> None:
        """Gives the recurrent layer another weight in its place, and the size of its inputs."""
        super().put(tensor)
        holder: Any = self.place[0]
        holder.input_size = tensor.shape[1]
        holder._flat_weights = [getattr(holder, name) for name in holder._flat_weights_names]


def channel_tensor(model: nn.Module, name: str) -> ChannelTensor | None:
    """The tensor of a name in a model, if it has a number, or a column, for each channel."""
    path, _, key = name.rpartition(".")
    try:
        holder = model.get_submodule(path)
    except AttributeError:
        return None
    tensor = {**vars(holder), **holder._parameters, **holder._buffers}.get(key)
    if isinstance(holder, nn.RNNBase) and key in INPUT_WEIGHTS:
        return InputWeight(holder, key) if _is_table(tensor) else None
    return ChannelTensor(holder, key) if _is_per_channel(tensor) or _is_table(tensor) else None


def part_of(model: nn.Module, name: str) -> nn.Module:
    """The module, or the `ChannelTensor`, of a name.

    Raises:
        AttributeError: there is none.
    """
    return channel_tensor(model, name) or model.get_submodule(name)


def channel_tensors(
    model: nn.Module,
    nodes: Sequence[Node],
    held_at: Mapping[str, str],
    inputs: Collection[Node],
    is_layer: Callable[[nn.Module], bool],
) -> dict[Node, str]:
    """The nodes of an exported graph that stand for such tensors -> their names.

    Those that a layer has, that several modules share, and that the graph writes into, do not
    count. A table is one of which rows are picked by positions, whatever the model is given.

    Args:
        model: that was exported, or a part of it.
        nodes: of its graph, or of one of its parts.
        held_at: name of a node -> name of the parameter, buffer or other tensor of a module that
            it stands for.
        inputs: those of them that stand for the model's inputs.
        is_layer: whether a module is a layer that gets smaller by itself.
    """
    owners: dict[int, int] = {}
    for module in model.modules():
        for owned in (module._parameters, module._buffers, vars(module)):
            for tensor in owned.values():
                owners[id(tensor)] = owners.get(id(tensor), 0) + 1
    given: set[Node] = set()
    """The nodes that depend on an input of the model."""
    for node in nodes:
        if node in inputs or not given.isdisjoint(node.all_input_nodes):
            given.add(node)
    found: dict[Node, str] = {}
    for node in nodes:
        held = channel_tensor(model, held_at[node.name]) if node.name in held_at else None
        if held is None or is_layer(held.place[0]) or owners[id(held.tensor)] > 1:
            continue
        if isinstance(held, InputWeight):
            if len(node.users) != 1 or node not in input_weights(next(iter(node.users))):
                continue
        elif held.is_table and not all(
            _picks_rows(user, node) and user not in given for user in node.users
        ):
            continue
        if node.users and not any(map(writes_in_place, node.users)):
            found[node] = held_at[node.name]
    return found


def sized_by_attributes(makers: Mapping[Node, nn.Module]) -> dict[Node, int]:
    """The nodes that fill a new tensor with one number -> the dimension along which an attribute of
    the module says how long it is: the first such, that of the examples last.

    Args:
        makers: node of an exported graph -> the module in whose forward it is.
    """
    found: dict[Node, int] = {}
    for node, module in makers.items():
        shape = shape_of(node)
        if op_name(node) not in FILLS or not shape or any(map(writes_in_place, node.users)):
            continue
        told = {value for value in vars(module).values() if type(value) is int and value > 1}
        dims = [dim for dim in (*range(1, len(shape)), 0) if shape[dim] in told]
        if dims:
            found[node] = dims[0]
    return found


def added(nodes: Sequence[Node], held: Mapping[Node, str], inputs: Collection[Node]) -> set[str]:
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
