"""Products of matrices that no layer's weight takes part in: what they cost, and whose units
they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from l0fast.graph.capture import Trace
from l0fast.graph.nodes import op_name, shape_of
from l0fast.graph.units import STAYS, narrowed
from l0fast.graph.walk import Walk

ATTENTION = "aten::scaled_dot_product_attention"
PRODUCTS = ("aten::matmul", "aten::bmm", "aten::baddbmm", ATTENTION)
"""Ops that are reckoned. What they sum over vanishes with what they give (see `rules`), so
that each element of the result costs the same, however many are left."""


class Product(NamedTuple):
    """One product whose result loses units."""

    caller: str
    """The innermost module in whose forward it is."""
    units: Tensor
    """Classes of units, each for an equal part of the result."""
    macs: float
    """Of one such part."""
    elements: float
    """That one such part gives; with its scores, if it is attention."""


def products(walk: Walk) -> list[Product]:
    """The products of a model's forward that get smaller with its units."""
    found: list[Product] = []
    for node, units in walk.values.items():
        if op_name(node) not in PRODUCTS or node in walk.trace.calls:
            continue
        classes = narrowed(walk.classes[narrowed(units.labels)])
        if bool((classes != walk.classes[STAYS]).any()):
            each = units.labels.numel() / classes.numel()
            macs, elements = _of_an_element(node)
            caller = walk.trace.callers[node]
            found.append(Product(caller, classes.flatten(), each * macs, each * elements))
    return found


def _of_an_element(node: Node) -> tuple[float, float]:
    """MACs, and elements given, for each element of the result."""
    shapes: Any = [shape_of(source) for source in node.args if isinstance(source, Node)]
    if op_name(node) != ATTENTION:
        return shapes[-2][-1], 1.0  # one more tensor comes first, where the product is added to it
    inner = shapes[0][-1]
    keys, size = shapes[1][-2], shapes[2][-1]  # scores = q @ k^T for each key, then scores @ v
    return keys * (1 + inner / size), 1 + keys / size


def unreckoned(trace: Trace) -> list[str]:
    """Ops of a model's forward that multiply and add, but are neither layers nor in `PRODUCTS`."""
    from torch.utils.flop_counter import FlopCounterMode  # it loads Triton

    found: list[str] = []
    for node in trace.nodes:
        if node.op != "call_function" or node in trace.calls or op_name(node) in PRODUCTS:
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
        counter = FlopCounterMode(display=False)
        try:
            target: Any = node.target
            with torch.no_grad(), counter:
                target(*args, **kwargs)  # on tensors without data
        except Exception:
            continue
        if counter.get_total_flops():
            found.append(op_name(node))
    return list(dict.fromkeys(found))
