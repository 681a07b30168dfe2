"""The residual branches of a model that can go as a whole: y = x + f(x), where f can be left out.

A branch is found where, in the model's graph,

- two tensors of one shape are added, one of which is x, at most in another form (where a ResNet's
  block changes the width, both are projections of x, and none can go); or several branches that
  read x are added, and then x;
- all of f is read by that addition alone;
- f ends in a Linear, a convolution, a batch, group, instance or layer norm, or an RMS norm, with
  nothing behind it but ops that make zeros of zeros (dropout, a LayerScale, a reshape): its gate
  multiplies what that layer, the host, gives;
- no layer of f is called twice, shares a weight with another, or has hooks, and all of f that has
  parameters, or multiplies matrices, lies in modules of its own. These give way to stand-ins, which
  pass on what they are given or give zeros (see `standins`).

So it is with the attentions and MLPs of transformers with norms before, inside or behind the
addition, and with the blocks of residual networks. A model that has other layers with a cache than
attentions, such as Mamba's, keeps its attentions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import Node

from l0fast.graph.caches import other_caches
from l0fast.graph.capture import CHANNELWISE, LAYERS, Trace
from l0fast.graph.computed import own_weights
from l0fast.graph.nodes import op_name
from l0fast.graph.residuals import Residual, residuals
from l0fast.graph.sites import tied_modules
from l0fast.graph.standins import Call, StandIn, stand_in
from l0fast.layers.branch import CHILD, BranchGate
from l0fast.layers.dense_types import is_in_out, kind_of
from l0fast.layers.hooks import foreign_hooks
from l0fast.layers.rms_norm import form_of
from l0fast.layers.ties import GATES

_KEEP = (
    "_unsafe_view alias clone contiguous dropout dropout_ flatten mul mul_ pad permute reshape "
    "roll slice squeeze to transpose type_as unflatten unsqueeze view"
)
KEEP_ZEROS = frozenset(f"aten::{name}" for name in _KEEP.split(" "))
"""Ops that make zeros of a tensor of zeros."""
_MULTIPLY = (
    "addmm baddbmm bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d "
    "einsum linear matmul mm scaled_dot_product_attention"
)
MATRICES = frozenset(f"aten::{name}" for name in _MULTIPLY.split(" "))
"""Ops that multiply matrices."""
_NORMS = {"aten::layer_norm": nn.LayerNorm, "aten::rms_norm": nn.RMSNorm}
_HOSTS = (*LAYERS, *(kind for kind in CHANNELWISE if kind is not nn.PReLU), *_NORMS.values())


@dataclass(frozen=True)
class Branch:
    """A residual branch that can go as a whole."""

    name: str
    """Of its host, the layer whose output its gate multiplies."""
    modules: tuple[StandIn, ...]
    """What takes the place of its modules."""
    block: StandIn | None = None
    """What takes the place of the module around it, which gives what it is given where all of
    `members` are closed; None: there is none."""
    members: tuple[str, ...] = ()
    """Names of all branches in that module."""

    def holds(self, name: str) -> bool:
        """Whether a module is one of the branch."""
        return any(f"{name}.".startswith(f"{one.name}.") for one in self.modules)


class _Refused(Exception):
    """Why a branch cannot go."""


def _inside(name: str, outer: str) -> bool:
    return not outer or f"{name}.".startswith(f"{outer}.")


def _changes_nothing(node: Node) -> bool:
    """Whether a node gives the very tensor that it is given, or checks one: whoever reads that
    tensor may be said to read what it gives."""
    if op_name(node) == "aten::to":
        source: Any = node.args[0]
        return source.meta["val"].dtype == node.meta["val"].dtype
    return op_name(node) == "aten::_assert_tensor_metadata"


def _fed(trace: Trace) -> set[Node]:
    """The nodes that are made of the model's input, not of parameters alone."""
    found: set[Node] = set()
    for node in trace.nodes:
        if node in trace.inputs or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


class Branches:
    """Finds the branches of a plain model.

    Args:
        model: without gates.
        trace: its export.
        calls: how its modules are called on the example (see `standins`).

    Attributes:
        found: the branches, in the graph's order.
        refused: host or addition -> why it is none.
    """

    def __init__(self, model: nn.Module, trace: Trace, calls: Mapping[str, Call]) -> None:
        self.model, self.trace, self.calls = model, trace, calls
        self.modules = dict(model.named_modules())
        self.tied = tied_modules(model)
        self.number = self._per_module(trace.callers)
        """Module -> how many nodes of the graph are of its forward, or of one inside it."""
        self.mixed = other_caches(model)
        self.fed = _fed(trace)
        self.refused: dict[str, str] = {}
        made: dict[str, tuple[Residual, tuple[StandIn, ...]]] = {}
        for one in residuals(trace):
            host = self._host(one)
            if host is None:
                name = trace.callers[one.add] or "the model"
                self.refused[name] = f"a branch of {name!r} does not end in a layer"
                continue
            try:
                made[host] = one, tuple(self._stand_ins(one, host))
            except _Refused as why:
                self.refused[host] = str(why)
        blocks = self._blocks({host: one for host, (one, _) in made.items()})
        self.found = [
            Branch(host, stands, *blocks.get(host, (None, ())))
            for host, (_, stands) in made.items()
        ]

    def _per_module(self, nodes: Any) -> Counter[str]:
        number: Counter[str] = Counter()
        for node in nodes:
            if node.op == "call_function" and not _changes_nothing(node):
                name = self.trace.callers[node]
                number[name] += 1
                while name:
                    name = name.rpartition(".")[0]
                    number[name] += 1
        return number

    # --- the modules --------------------------------------------------------------------------

    def _host(self, one: Residual) -> str | None:
        """The layer that a branch ends in."""
        node = one.last
        while True:
            name = self.trace.calls.get(node) or self.trace.callers[node]
            module = self.modules[name]
            if form_of(module) is not None or is_in_out(module):  # written in several ops
                return name
            if node in self.trace.calls or isinstance(module, _NORMS.get(op_name(node), ())):
                return name if issubclass(kind_of(module), _HOSTS) else None
            inner = [source for source in node.all_input_nodes if source in self.fed & one.nodes]
            if op_name(node) not in KEEP_ZEROS or len(inner) != 1:
                return None
            node = inner[0]

    def _stand_ins(self, one: Residual, host: str) -> list[StandIn]:
        """What takes the place of a branch's modules."""
        layer = self.modules[host]
        if not isinstance(layer._parameters.get("weight"), nn.Parameter) or not own_weights(layer):
            raise _Refused(f"{host!r} has no weight that its gate could become a part of")
        number = self._per_module(one.nodes)
        owned = {name for name, count in number.items() if count == self.number[name]}
        tops = [name for name in owned if name.rpartition(".")[0] not in owned]
        found = [
            stand
            for name in self.modules  # in the model's order
            if name in tops
            for stand in self._of_module(name, host)
        ]
        for node in filter(self._is_heavy, one.nodes):
            caller = self.trace.callers[node]
            if any(_inside(caller, stand.name) for stand in found):
                continue
            if caller and self._per_module(one.nodes | one.sums)[caller] < self.number[caller]:
                raise _Refused(f"something that {caller!r} computes is read outside of the branch")
            raise _Refused(f"{op_name(node)} is written out in the forward of {caller!r}")
        return found

    def _is_heavy(self, node: Node) -> bool:
        return node in self.trace.calls or op_name(node) in MATRICES

    def needed(self, branch: Branch) -> Branch:
        """The same branch, whose norms and the like stay: perhaps something reads their
        attributes."""
        heavy = {self.trace.callers[n] for n in self.trace.callers if self._is_heavy(n)}
        norms = {n for n, m in self.modules.items() if kind_of(m) not in LAYERS and n in heavy}
        stay = [
            stand
            for stand in branch.modules
            if stand.zeros or any(_inside(name, stand.name) for name in heavy - norms)
        ]
        return replace(branch, modules=tuple(stay))

    def _of_module(self, name: str, host: str) -> list[StandIn]:
        """What takes the place of one module, or of those inside it."""
        module = self.modules[name]
        inside = {other: one for other, one in self.modules.items() if _inside(other, name)}
        heavy = {self.trace.callers[n] for n in self.trace.callers if self._is_heavy(n)}
        if not any(True for _ in module.parameters()) and heavy.isdisjoint(inside):
            return []  # it costs nothing
        for other, one in inside.items():
            if other in self.tied:
                raise _Refused(f"{other!r} shares its weight with {self.tied[other]}")
            if foreign_hooks(one):
                raise _Refused(f"{other!r} has hooks")
            if self.mixed and hasattr(one, "layer_idx"):
                raise _Refused(f"{other!r} has a cache of another kind than other layers")
        stand = stand_in(name, module, self.calls.get(name), _inside(host, name))
        if stand is not None:
            return [stand]
        own = any(value is not None for value in module._parameters.values())
        if own or name in heavy or not module._modules:
            raise _Refused(f"{name!r} gives another shape than it takes, or is called twice")
        children = [f"{name}.{child}" for child in module._modules]
        return [stand for child in children for stand in self._of_module(child, host)]

    def _blocks(self, made: Mapping[str, Residual]) -> dict[str, tuple[StandIn, tuple[str, ...]]]:
        """Host -> the block around its branch that does nothing else than to add branches."""
        around: dict[str, list[str]] = {}
        for host, one in made.items():
            around.setdefault(self.trace.callers[one.add], []).append(host)
        found: dict[str, tuple[StandIn, tuple[str, ...]]] = {}
        for name, hosts in around.items():
            nodes = set[Node]().union(*(made[host].nodes | made[host].sums for host in hosts))
            for node in reversed(self.trace.nodes):  # a norm that several of them read
                inside = _inside(self.trace.callers.get(node, ""), name)
                if inside and node.users and nodes.issuperset(node.users):
                    nodes.add(node)
            if not name or self._per_module(nodes)[name] != self.number[name]:
                continue
            stand = stand_in(name, self.modules[name], self.calls.get(name), False)
            if stand is not None:
                found.update((host, (stand, tuple(hosts))) for host in hosts)
        return found


def without(branch: Branch, names: set[str]) -> Branch:
    """The same where some branches of its block are none."""
    lost = branch.block is not None and not names.isdisjoint(branch.members)
    return replace(branch, block=None, members=()) if lost else branch


def branch_of(name: str, gate: BranchGate) -> Branch:
    """What a gate is on, by the names in the model where the gate has this one: it may be a part of
    the model in which the branch was found, or have that as a part."""
    branch: Branch = gate.branch
    host = name.removesuffix(f".{CHILD}")
    if host == branch.name:
        return branch
    more = host.removesuffix(branch.name) if host.endswith(branch.name) else ""
    less = branch.name.removesuffix(host) if not more else ""

    def stands(some: Iterable[StandIn | None]) -> list[StandIn]:
        inside = (one for one in some if one is not None and one.name.startswith(less))
        return [replace(one, name=more + one.name.removeprefix(less)) for one in inside]

    block = stands([branch.block])
    members = tuple(more + one.removeprefix(less) for one in branch.members) if block else ()
    return Branch(host, tuple(stands(branch.modules)), block[0] if block else None, members)


def parameters_of(model: nn.Module, branch: Branch) -> int:
    """How many parameters a branch has, without gates."""
    tensors: dict[int, Tensor] = {
        id(one): one
        for stand in branch.modules
        for name, one in model.get_submodule(stand.name).named_parameters()
        if name.rpartition(".")[2] != GATES
    }
    return sum(one.numel() for one in tensors.values())
