"""What torch.export needs around it: quiet, outputs that it knows, and only what is read."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from l0fast.graph.compare import values_of
from l0fast.graph.nodes import op_name
from l0fast.layers.dense_types import is_rewritten

LOCK = threading.RLock()
"""Held during an export, which changes what all threads of a process share."""


@contextmanager
def quietly() -> Generator[None]:
    """torch.export speaks of its own affairs, on stderr too: not while we use it."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class FixedSizes(TorchFunctionMode):
    """Refuses, as it is traced, a forward with sizes that depend on what it is given: as where a
    mixture picks the tokens of each expert. Tracing such a one takes long."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        picks = func is torch.Tensor.__getitem__ and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for one in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if picks or func in _PICK or (func is torch.where and len(args) == 1):
            raise ValueError(f"sizes depend on the data ({getattr(func, '__name__', func)})")
        return func(*args, **(kwargs or {}))


_PICK = (torch.nonzero, Tensor.nonzero, torch.masked_select, Tensor.masked_select)


def refuse_sizes_of_data(graph: Graph) -> None:
    """Raises for a graph that has such sizes."""
    for node in graph.nodes:
        given = tree_leaves(node.meta.get("val"))
        if any(type(n) is not int for one in given if isinstance(one, Tensor) for n in one.shape):
            raise ValueError(f"sizes depend on the data ({op_name(node)})")


def plain(value: Any) -> Any:
    """What a model gives, of containers that torch.export knows: lists in place of objects, see
    `values_of`."""
    if isinstance(value, Mapping):
        return [plain(part) for part in value.values()]
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    known = value is None or isinstance(value, (Tensor, str, int, float, complex))
    return value if known else values_of(value)


@contextmanager
def without_validation() -> Generator[None]:
    """Distributions look at the values that they are given, which torch.export does not know."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def as_linears(model: nn.Module) -> Generator[None]:
    """Linears whose class has a forward of its own compute by that of nn.Linear, which is one op.
    Not so those that were given a forward themselves."""
    rewritten = filter(is_rewritten, model.modules())
    found = [module for module in rewritten if "forward" not in vars(module)]
    try:
        for module in found:
            vars(module)["forward"] = MethodType(nn.Linear.forward, module)
        yield
    finally:
        for module in found:
            del vars(module)["forward"]


def read_nodes(graph: torch.fx.Graph, layer_ops: Collection[str]) -> set[Node]:
    """The nodes that reach an output or change something; drops the others, which tie no units.

    Calls of layers are not dropped, nor what is made of their outputs: they run, so that sizes
    must fit.

    Args:
        graph: of an export.
        layer_ops: the ops that layers call.
    """
    read: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.is_impure() or not read.isdisjoint(node.users):
            read.add(node)
    unread: set[Node] = set()
    for node in graph.nodes:
        called = op_name(node) in layer_ops or not unread.isdisjoint(node.all_input_nodes)
        if called and node not in read:
            unread.add(node)
    graph.eliminate_dead_code(lambda node: node in read or node in unread)
    return read
