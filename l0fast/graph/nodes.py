"""What a node of an exported graph says of itself: its op, its arguments, its shape."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg


def op_name(node: Node) -> str:
    """The name of a node's op, such as "aten::relu"; "" for what is not an op."""
    if node.op != "call_function":
        return ""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.name
    return getattr(node.target, "__name__", str(node.target))


def op_in_words(node: Node, module: str = "") -> str:
    """The op of a node, the module in whose forward it is, and the line of code that calls it,
    where these are known."""
    name = op_name(node) + (f" in {module!r}" if module else "")
    calls = re.findall(r'File "([^"]+)", line (\d+).*\n\s*(.*)', node.meta.get("stack_trace") or "")
    for path, line, code in reversed(calls):
        if f"{os.sep}torch{os.sep}" not in path:
            return f"{name} ({os.path.basename(path)}:{line}: {shorten(code, 60)})"
    return name


def writes_in_place(node: Node) -> bool:
    """Whether a node may change one of its inputs."""
    if node.op != "call_function" or op_name(node) == "getitem":
        return False
    schema = getattr(node.target, "_schema", None)
    return True if schema is None else schema.is_mutable


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a node, by its place or its name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def run_on(node: Node, of: Mapping[Node, Tensor]) -> Any:
    """The node's own op, on other tensors."""
    target: Any = node.target
    if op_name(node) in ("aten::view", "aten::_unsafe_view"):
        target = torch.ops.aten.reshape.default  # what stands for the tensor may be expanded
    with torch.no_grad():
        return target(*map_arg(node.args, of.__getitem__), **map_arg(node.kwargs, of.__getitem__))


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of the (first) tensor a node gives, if it is known and static."""
    value: Any = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    shape = getattr(value, "shape", None)
    if shape is None or not all(isinstance(size, int) for size in shape):
        return None
    return tuple(shape)
