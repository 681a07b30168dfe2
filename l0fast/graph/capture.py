"""One export of a plain model: its graph, and which nodes are whose calls."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node

from l0fast.graph.calls import Example
from l0fast.graph.nodes import op_name
from l0fast.layers.dense_types import DENSE_TYPES, dense_type_of

LAYERS = {kind: dims for dims, kind in enumerate(DENSE_TYPES)}
"""Classes of layers that can be made smaller -> how many dimensions follow their channels."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Classes of norms that shrink with the channels they pass on, in dimension 1."""

_CALLS = {"aten::linear", "aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::batch_norm"}


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a layer; of a gated one or of a subclass, the dense class that it stands for."""
    gated = getattr(module, "dense_type", None)
    return gated or dense_type_of(type(module)) or type(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm; classes that add an activation to it count, too."""
    return isinstance(module, NORMS)


def is_site(module: nn.Module) -> bool:
    """Whether a module is one that can be made smaller."""
    if is_norm(module):
        return module._buffers.get("running_mean") is not None
    return kind_of(module) in LAYERS and module._parameters.get("weight") is not None


def is_carrier(layer: nn.Module) -> bool:
    """Whether a layer passes its channels on (a norm, or a convolution in groups of them)."""
    return is_norm(layer) or getattr(layer, "groups", 1) > 1


def layer_size(layer: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a Linear, a convolution or a batch norm."""
    if isinstance(layer, NORMS):
        return layer.num_features, layer.num_features
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels  # type: ignore[return-value]


@dataclass
class Trace:
    """An exported model: its graph, and which layers' own calls its nodes are.

    Layers are Linears, convolutions and batch norms.
    """

    graph: torch.fx.Graph
    calls: dict[Node, str]
    callers: dict[Node, str]
    """Node -> the innermost module in whose forward it is."""
    inputs: set[str]
    """Names of the nodes that are the model's own inputs."""
    read_outside: set[str]
    """Layers whose weights something other than their own call reads."""
    counts: Counter[str] = field(init=False)
    """How often each layer is called."""

    def __post_init__(self) -> None:
        self.counts = Counter(self.calls.values())


@contextmanager
def _quietly() -> Generator[None]:
    """torch.export speaks of its own affairs: not while we use it."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _without_dataclasses(value: Any) -> Any:
    """What a model gives, its dataclasses as the lists of their fields."""
    if isinstance(value, Mapping):  # a registered class, or a dict, which is its own structure
        return value
    parts: Any = value if type(value) in (tuple, list) else None
    if is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, part.name) for part in fields(value)]
    return value if parts is None else [_without_dataclasses(part) for part in parts]


def export(model: nn.Module, example: Example) -> Trace:
    """The graph of one forward of `model` on an example, in evaluation.

    torch.export refuses a dataclass that nobody has registered as an output: it sees the fields.

    Raises:
        Exception: whatever torch.export raises for a model that it refuses.
    """
    plain = model.register_forward_hook(lambda _model, _args, given: _without_dataclasses(given))
    try:
        with _quietly(), torch.no_grad():
            program = torch.export.export(model, example.args, dict(example.kwargs), strict=False)
    finally:
        plain.remove()
    program.graph.eliminate_dead_code()  # what nobody reads ties no units
    signature = program.graph_signature
    held_at = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}

    def holder(node: object) -> tuple[nn.Module, str] | None:
        """The module and attribute of the tensor that a placeholder stands for."""
        name = held_at.get(node.name) if isinstance(node, Node) else None
        if name is None:
            return None
        path, _, attribute = name.rpartition(".")
        return modules[path], attribute

    def tensors(module: nn.Module) -> dict[str, Any]:
        return {**module._parameters, **module._buffers}

    calls: dict[Node, str] = {}
    callers: dict[Node, str] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        path = next(reversed(stack.values()))[0] if stack else ""
        caller = modules.get(path, model)
        callers[node] = names[id(caller)]
        if op_name(node) not in _CALLS or not is_site(caller):
            continue
        place, key = (3, "running_mean") if is_norm(caller) else (1, "weight")
        held = holder(node.args[place])
        if held is not None and held[1] == key:  # perhaps another layer's, which is the same
            mine, its = (tensors(one).get(key) for one in (caller, held[0]))
            if mine is its:
                calls[node] = names[id(caller)]
    read_outside: set[str] = set()
    for node in program.graph.nodes:
        held_by = holder(node)
        if held_by is None or not is_site(held_by[0]):
            continue
        # A higher-order op (a region under autocast or no_grad) may hold the layer's own call.
        foreign = (user for user in node.users if user not in calls)
        if any(isinstance(user.target, torch._ops.OpOverload) for user in foreign):
            read_outside.add(names[id(held_by[0])])
    # Those that are tensors: the text of another one may be the name of any node.
    inputs = {
        spec.arg.name
        for spec in signature.input_specs
        if spec.kind is InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    }
    return Trace(program.graph, calls, callers, inputs, read_outside)
