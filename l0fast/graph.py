"""One export of a plain model, and what it says about the channels between its layers.

Forward: which channels are constant, and where each one lies. Backward: which of them somebody
reads. A channel that every reader ignores (its gate there is closed, or it is constantly zero
there) need not exist, whatever is between; one that reaches an op which cannot be followed must.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from l0fast.channels import (
    IGNORED,
    RULES,
    VIEW_RULES,
    Flow,
    op_name,
    rule_for,
    shape_of,
    writes_in_place,
)

LAYERS: dict[type[nn.Module], int] = {nn.Linear: 0, nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
"""Classes of layers that can be made smaller -> how many dimensions follow their channels."""

_CALLS = {"aten::linear", "aten::conv1d", "aten::conv2d", "aten::conv3d"}


@dataclass(frozen=True)
class Site:
    """A layer that may get smaller, as its own gates and the rest of the model leave it."""

    name: str
    layer: nn.Module
    reads: Tensor
    """bool [in]: inputs that its gates leave open."""
    writes: Tensor
    """bool [out]: outputs that its gates leave open."""
    fixed: str = ""
    """Why its full inputs and outputs must stay where they are, if they must."""
    local: bool = True
    """Whether it may nevertheless compute less inside, with a gather and a scatter around."""


@dataclass
class Extent:
    """What one layer physically has: its columns and rows, and what arrives and leaves."""

    arrives: Tensor
    """bool [in]: inputs that are there."""
    columns: Tensor
    """bool [in], within `arrives`: inputs that it computes with."""
    rows: Tensor
    """bool [out]: outputs that it computes."""
    leaves: Tensor
    """bool [out], around `rows`: outputs that are there afterwards, zeros where not computed."""
    source: str = ""
    """Where the inputs come from, if they could not be followed."""
    stops: list[str] = field(default_factory=list)
    """What reads the outputs and cannot be followed."""


@dataclass
class Trace:
    """An exported model: its graph, and which layers' own calls its nodes are."""

    graph: torch.fx.Graph
    calls: dict[Node, str]
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


def export(model: nn.Module, args: tuple[Any, ...]) -> Trace:
    """The graph of one forward of `model`, in evaluation.

    Raises:
        Exception: whatever torch.export raises for a model that it refuses.
    """
    with _quietly(), torch.no_grad():
        program = torch.export.export(model, args, strict=False)
    parameters = program.graph_signature.inputs_to_parameters
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): name for name, module in model.named_modules()}

    def holder(node: object) -> tuple[nn.Module, str] | None:
        """The module and attribute of the parameter that a placeholder stands for."""
        name = parameters.get(node.name) if isinstance(node, Node) else None
        if name is None:
            return None
        path, _, attribute = name.rpartition(".")
        return modules[path], attribute

    calls: dict[Node, str] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if op_name(node) not in _CALLS or not stack:
            continue
        caller = modules.get(next(reversed(stack.values()))[0])
        if type(caller) in LAYERS and holder(node.args[1]) == (caller, "weight"):
            calls[node] = names[id(caller)]
    read_outside: set[str] = set()
    for node in program.graph.nodes:
        held = holder(node)
        if held is None or type(held[0]) not in LAYERS:
            continue
        # A higher-order op (a region under autocast or no_grad) may hold the layer's own call.
        foreign = (user for user in node.users if user not in calls)
        if any(isinstance(user.target, torch._ops.OpOverload) for user in foreign):
            read_outside.add(names[id(held[0])])
    return Trace(program.graph, calls, read_outside)


def local_extents(sites: Iterable[Site]) -> dict[str, Extent]:
    """Every layer by itself: gather its open inputs, compute, scatter its open outputs."""
    return {site.name: _local(site) for site in sites}


def _local(site: Site) -> Extent:
    arrives, leaves = torch.ones_like(site.reads), torch.ones_like(site.writes)
    columns, rows = (site.reads, site.writes) if site.local else (arrives, leaves)
    return Extent(arrives, columns, rows, leaves)


class Walk:
    """The state of one walk along the graph."""

    def __init__(self, trace: Trace, sites: dict[str, Site], views: bool) -> None:
        self.sites, self.trace = sites, trace
        self.rules = RULES | VIEW_RULES if views else RULES
        self.names = list(sites)
        sizes = torch.tensor([len(site.writes) for site in sites.values()], dtype=torch.int64)
        total = int(sizes.sum())
        ends = sizes.cumsum(0).tolist()
        self.ranges = {
            name: torch.arange(end - len(sites[name].writes), end)
            for name, end in zip(sites, ends, strict=True)
        }
        """Layer -> the channels that it makes."""
        self.maker = torch.arange(len(sites)).repeat_interleave(sizes)
        self.pinned = torch.zeros(total, dtype=torch.bool)
        self.tainted = torch.zeros(total, dtype=torch.bool)
        self.stops: dict[str, list[str]] = {name: [] for name in sites}
        self.flows: dict[Node, Flow] = {}
        self.lost: dict[Node, str] = {}
        self.reading: dict[str, tuple[Flow | None, str]] = {}

    def pin(self, flow: Flow | None, reason: str) -> None:
        """Every channel of `flow` must exist, because of `reason`."""
        if flow is None:
            return
        self.pinned[flow.labels] = True
        for index in self.maker[flow.labels].unique().tolist():
            stops = self.stops[self.names[index]]
            if reason not in stops:
                stops.append(reason)

    def run(self) -> None:
        for node in self.trace.graph.nodes:
            if node in self.trace.calls:
                self.call(node, self.sites[self.trace.calls[node]])
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self.pin(self.flows.get(source), "the model's output")
            elif node.op == "call_function":
                self.op(node)
            else:
                inputs = node.op == "placeholder"
                self.lost[node] = f"the model's input {node.name!r}" if inputs else "a constant"

    def call(self, node: Node, site: Site) -> None:
        """A layer's own call: reads one flow, begins another."""
        source: Any = node.args[0]
        flow = self.flows.get(source)
        lost = self.lost.get(source, "")
        inner = LAYERS[type(site.layer)]
        shape, made = shape_of(source), shape_of(node)
        if flow is not None and (shape is None or flow.dim != len(shape) - 1 - inner):
            lost = f"{site.name!r}, along another dimension"
            self.pin(flow, lost)
            flow = None
        once = self.trace.counts[site.name] == 1
        if site.fixed or not once:
            reason = site.fixed or f"called {self.trace.counts[site.name]} times"
            self.pin(flow, f"{site.name!r}, which is kept as it is ({reason})")
        self.reading[site.name] = flow, lost
        if made is None or not once:
            self.lost[node] = f"{site.name!r}"
            return
        constant = torch.full((len(site.writes),), math.nan, dtype=torch.float64)
        constant[~site.writes] = 0.0
        self.flows[node] = Flow(len(made) - 1 - inner, self.ranges[site.name], constant)
        if site.fixed:
            self.pin(self.flows[node], site.fixed)

    def op(self, node: Node) -> None:
        """Any other op: its rule, or the end of what flows into it."""
        name = op_name(node)
        sources = node.all_input_nodes
        if name in IGNORED or not sources:
            self.lost[node] = name
            return
        rule, flow = rule_for(node, self.rules), self.flows.get(sources[0])
        if rule is not None and flow is None:
            self.lost[node] = self.lost.get(sources[0], name)
            if writes_in_place(node):  # perhaps into a view of a tensor that was followed
                zero = rule(node, Flow(0, torch.zeros(1).long(), torch.zeros(1).double()))
                self.tainted |= zero is None or bool(zero.constant != 0)
            return
        after = rule(node, flow) if rule is not None and flow is not None else None
        if after is not None and flow is not None:
            self.flows[node] = after
            if writes_in_place(node):  # other views of the same memory no longer hold what they did
                changed = (flow.constant == 0) & (after.constant != 0)
                self.tainted[flow.labels[changed]] = True
            return
        self.lost[node] = name
        for source in sources:
            self.pin(self.flows.get(source), name)
        if writes_in_place(node):
            self.tainted[:] = True


def extents(trace: Trace, sites: Iterable[Site], views: bool = True) -> dict[str, Extent]:
    """What each layer physically needs, with gathers and scatters only where they must be.

    Args:
        trace: the export of the model whose layers the sites are.
        sites: every Linear and convolution of the model.
        views: follow channels across reshapes.
    """
    by_name = {site.name: site for site in sites}
    walk = Walk(trace, by_name, views)
    walk.run()
    result = local_extents(by_name.values())

    columns: dict[str, Tensor] = {}
    exists = walk.pinned.clone()
    for name, (flow, _) in walk.reading.items():
        site = by_name[name]
        if flow is None or site.fixed or walk.trace.counts[name] != 1:
            continue
        zero = (flow.constant == 0) & ~walk.tainted[flow.labels]
        columns[name] = site.reads & ~zero
        exists[flow.labels[columns[name]]] = True
    # A layer keeps a unit even if its readers and its own gates have none in common.
    spared = torch.zeros_like(exists)
    for name, site in by_name.items():
        labels = walk.ranges[name]
        if bool(site.writes.any()) and not bool((exists[labels] & site.writes).any()):
            spared[labels[site.writes.nonzero()[0]]] = True
    exists |= spared

    for name, extent in result.items():
        site = by_name[name]
        if walk.trace.counts[name] != 1:
            continue
        flow, extent.source = walk.reading[name]
        extent.stops = walk.stops[name]
        labels = walk.ranges[name]
        if site.fixed:
            continue
        extent.leaves = exists[labels]
        extent.rows = extent.leaves & site.writes
        if flow is not None:
            extent.arrives = exists[flow.labels]
            extent.columns = columns[name]
            if not bool(extent.columns.any()):
                extent.columns[extent.arrives.nonzero()[0]] = True
    return result
