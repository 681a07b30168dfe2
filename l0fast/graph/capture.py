"""One export of a plain model: its graph, and which nodes are whose calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node

from l0fast.graph.calls import Example
from l0fast.graph.computed import own_weights
from l0fast.graph.exporting import (
    LOCK,
    FixedSizes,
    as_linears,
    plain,
    quietly,
    read_nodes,
    refuse_sizes_of_data,
    without_validation,
)
from l0fast.graph.nodes import argument, op_name
from l0fast.graph.recurrent import readers
from l0fast.graph.tensors import ChannelTensor, InputWeight, channel_tensors, sized_by_attributes
from l0fast.graph.trace import Trace
from l0fast.layers.dense_types import LAYERS, TRANSPOSED, inner_dims, is_in_out
from l0fast.layers.rms_norm import GatedRMSNorm, StandIn, form_of

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Classes of batch norms."""

_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

CHANNELWISE: dict[type[nn.Module], str] = {
    **dict.fromkeys((*NORMS, *_INSTANCE_NORMS), "num_features"),
    nn.GroupNorm: "num_channels",
    nn.PReLU: "num_parameters",
    ChannelTensor: "channels",
}
"""Classes of layers with a number for each channel that they pass on, in dimension 1 -> the
attribute that says of how many. They shrink with the channels."""


@dataclass(frozen=True)
class _Call:
    """What a layer's own call looks like in a graph."""

    op: str
    place: int
    """Of the argument that is a tensor of the layer; it is None where the layer has none."""
    key: str
    """The name of that tensor."""
    input: int = 0
    """The place of its input."""


_CALLS: dict[type[nn.Module], _Call] = {
    nn.Linear: _Call("aten::linear", 1, "weight"),
    **{
        kind: _Call(f"aten::conv{'_transpose' * (kind in TRANSPOSED)}{dims}d", 1, "weight")
        for kind, dims in LAYERS.items()
        if dims
    },
    **dict.fromkeys(NORMS, _Call("aten::batch_norm", 3, "running_mean")),
    **dict.fromkeys(_INSTANCE_NORMS, _Call("aten::instance_norm", 1, "weight")),
    nn.GroupNorm: _Call("aten::group_norm", 2, "weight"),
    nn.PReLU: _Call("aten::prelu", 1, "weight"),
    StandIn: _Call("aten::rms_norm", 2, "weight"),
    nn.Embedding: _Call("aten::embedding", 0, "weight", input=1),
}
_IN_OUT_CALL = _Call("aten::addmm", 2, "weight", input=1)


def _call_of(layer: nn.Module) -> _Call | None:
    """What the own call of a layer looks like; None for what is no layer."""
    if is_in_out(layer):
        return _IN_OUT_CALL
    return next((call for kind, call in _CALLS.items() if isinstance(layer, kind)), None)


def input_place(layer: nn.Module) -> int:
    """The place of the input among the arguments of a layer's own call."""
    call = _call_of(layer)
    return 0 if call is None else call.input


def _size_name(module: nn.Module) -> str:
    """The attribute that says how many channels a layer of `CHANNELWISE` has, else ""."""
    if isinstance(module, InputWeight):
        return ""
    return next((name for kind, name in CHANNELWISE.items() if isinstance(module, kind)), "")


def is_channelwise(module: nn.Module) -> bool:
    """Whether a module passes channels on and has a number for each; classes that add an
    activation to such a norm count, too."""
    return bool(_size_name(module))


def is_site(module: nn.Module) -> bool:
    """Whether a module is one that can be made smaller, in any model; see `sites_in`."""
    if isinstance(module, (GatedRMSNorm, StandIn, InputWeight)):
        return True
    if not own_weights(module):
        return False
    if isinstance(module, NORMS):
        return module._buffers.get("running_mean") is not None
    if isinstance(module, nn.PReLU):
        return module.num_parameters > 1
    if is_channelwise(module):
        return True
    return inner_dims(module) is not None and module._parameters["weight"] is not None


def sites_in(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, of those in a model that can be made smaller: embeddings only where they may
    write into a residual stream that has gates."""
    modules = dict(model.named_modules())
    stream = any(isinstance(module, (GatedRMSNorm, StandIn)) for module in modules.values())
    return {
        name: module
        for name, module in modules.items()
        if is_site(module)
        or (stream and isinstance(module, nn.Embedding) and own_weights(module, ["weight"]))
    }


def is_rms_norm(layer: nn.Module) -> bool:
    """Whether a layer is an RMS norm with a weight for each channel, gated or not."""
    return isinstance(layer, StandIn) or form_of(layer) is not None


def can_be_edited(layer: nn.Module) -> bool:
    """Whether a layer is of a class that a recipe may make smaller."""
    return is_site(layer) or isinstance(layer, nn.Embedding) or is_rms_norm(layer)


def groups_of(layer: nn.Module) -> int:
    """How many groups of channels a layer has that can only vanish as wholes; of one that treats
    each channel alone, one for each."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return layer_size(layer)[0] if is_channelwise(layer) else getattr(layer, "groups", 1)


def is_carrier(layer: nn.Module) -> bool:
    """Whether a layer passes its channels on: a norm of channels, an RMS norm of a stream, slopes,
    or a convolution in groups of them."""
    return is_channelwise(layer) or getattr(layer, "groups", 1) > 1 or is_rms_norm(layer)


def train_but_norms(model: nn.Module) -> None:
    """Puts a model into training, but for its batch norms: one example may be too few for them, and
    their counting is no known op."""
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer that can be made smaller."""
    if isinstance(layer, InputWeight):
        return layer.channels, 1
    if name := _size_name(layer):
        return getattr(layer, name), getattr(layer, name)
    if is_in_out(layer):
        return layer.nx, layer.nf  # type: ignore[return-value]
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    if is_rms_norm(layer):
        return (layer._parameters["weight"].numel(),) * 2  # type: ignore[union-attr]
    return layer.in_channels, layer.out_channels  # type: ignore[return-value]


def resize_(layer: Any, inputs: int, outputs: int) -> None:
    """Sets the attributes that say a layer's size; a group keeps its size."""
    before = layer_size(layer)[0]
    if isinstance(layer, nn.GroupNorm):
        layer.num_groups = layer.num_groups * inputs // before
    elif getattr(layer, "groups", 1) > 1:
        layer.groups = layer.groups * inputs // before
    if name := _size_name(layer):
        setattr(layer, name, outputs)
        return
    if isinstance(layer, nn.Embedding):
        layer.embedding_dim = outputs
    elif is_in_out(layer):
        vars(layer).update(nx=inputs, nf=outputs)
        return
    unit = "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(layer, f"in_{unit}", inputs)
    setattr(layer, f"out_{unit}", outputs)


def _names_of_tensors(signature: Any) -> set[str]:
    """The names of the nodes that stand for inputs that are tensors: the text of another input may
    be the name of any node."""
    return {
        spec.arg.name
        for spec in signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    }


def export(model: nn.Module, example: Example, whole: nn.Module | None = None) -> Trace:
    """The graph of one forward of `model` on an example, in evaluation.

    Args:
        model: to export.
        example: of what its forward takes.
        whole: the model that it is a part of, and that names are those of; itself by default.

    torch.export refuses an object of a class that nobody has registered as an output: it sees the
    tensors in it, and not a decoder's cache.

    Raises:
        Exception: whatever torch.export raises for a model that it refuses.
    """
    hook = model.register_forward_hook(lambda _model, _args, given: plain(given))
    try:
        # One at a time: it changes what all threads of a process share.
        fixed, linears = FixedSizes(), as_linears(model)
        with LOCK, quietly(), without_validation(), linears, torch.no_grad(), fixed:
            program = torch.export.export(model, example.args, dict(example.kwargs), strict=False)
    finally:
        hook.remove()
    refuse_sizes_of_data(program.graph)
    read = read_nodes(program.graph, {call.op for call in (*_CALLS.values(), _IN_OUT_CALL)})
    signature = program.graph_signature
    whole = model if whole is None else whole
    modules = dict(whole.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in whole.named_modules()}
    sites = set(map(id, sites_in(whole).values()))
    inside = f"{names[id(model)]}." if names[id(model)] else ""
    held_at = {
        node: inside + name
        for of in (
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
            signature.inputs_to_lifted_tensor_constants,
        )
        for node, name in of.items()
    }

    def holder(node: object) -> tuple[nn.Module, str] | None:
        """The module and attribute of the tensor that a placeholder stands for."""
        name = held_at.get(node.name) if isinstance(node, Node) else None
        path, _, attribute = (name or "").rpartition(".")
        return None if name is None or path not in modules else (modules[path], attribute)

    def tensor(module: nn.Module, key: str) -> Any:
        return {**module._parameters, **module._buffers}.get(key)

    def is_call(node: Node, caller: nn.Module) -> bool:
        """Whether a node is the own call of the layer in whose forward it is."""
        call = _call_of(caller)
        if call is None or op_name(node) != call.op or id(caller) not in sites:
            return False
        if isinstance(caller, nn.GroupNorm) and node.args[1] != caller.num_groups:
            return False
        mine, held = tensor(caller, call.key), holder(argument(node, call.place, call.key))
        if held is None:  # a norm without numbers
            return mine is None
        # Perhaps another layer's, which is the same.
        return held[1] == call.key and mine is tensor(held[0], call.key)

    calls: dict[Node, str] = {}
    callers: dict[Node, str] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        caller = modules.get(inside + path, model)
        callers[node] = names[id(caller)]
        if is_call(node, caller):
            calls[node] = names[id(caller)]
    read_outside: set[str] = set()
    for node in program.graph.nodes:
        held_by = holder(node)
        if held_by is None or id(held_by[0]) not in sites or not tensor(*held_by).dim():
            continue  # a number of its own, such as a scale of embeddings, follows no size
        # A higher-order op (a region under autocast or no_grad) may hold the layer's own call.
        foreign = (user for user in node.users if user not in calls)
        if any(isinstance(user.target, torch._ops.OpOverload) for user in foreign):
            read_outside.add(names[id(held_by[0])])
    given, nodes = _names_of_tensors(signature), list(program.graph.nodes)
    inputs = {node for node in nodes if node.name in given}
    unread = {name for node, name in calls.items() if node not in read}
    held = channel_tensors(whole, nodes, held_at, inputs, lambda module: id(module) in sites)
    tensors = {node: held_at[node.name] for node in nodes if node.name in held_at}
    filled = sized_by_attributes({node: modules[callers[node]] for node in nodes})
    found = calls, callers, inputs, read_outside, unread, held, tensors, filled
    return Trace(nodes, *found, readers(nodes, held))
