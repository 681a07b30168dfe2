"""Modules whose own code computes a size that no attribute holds: made anew, with the size that is
left.

As in `B, N, C = x.shape; ...; x.reshape(B, N, C)`, where C is what enters and the units inside have
become fewer. What comes out is a torch.fx module of the same parameters and the same modules
inside, which copies, pickles, compiles and exports without l0fast.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from l0fast import _checks
from l0fast.graph.capture import is_site
from l0fast.graph.sites import replace
from l0fast.graph.views import Size, View
from l0fast.layers.hooks import foreign_hooks
from l0fast.pruning.attributes import AttributePatch
from l0fast.pruning.called import Calls, Constant
from l0fast.pruning.forks import one_graph

_CALLS: dict[Any, str] = {
    "reshape": "reshape",
    "view": "reshape",
    torch.reshape: "reshape",
    "split": "split",
    "split_with_sizes": "split",
    torch.split: "split",
}
"""What a node of torch.fx calls -> the kind of view."""

_OWN = ("__call__", "train", "_apply", "_load_from_state_dict", "get_extra_state", "state_dict")
"""Methods that a module made anew has from nn.Module."""


@dataclass(frozen=True)
class ViewPatch:
    """A module made anew with other sizes in its views; as JSON, one entry of the recipe."""

    name: str
    kind: str
    """Its class."""
    constants: tuple[tuple[str, Constant], ...]
    """Arguments of its forward that are always the same, and their values."""
    lengths: tuple[tuple[str, int], ...]
    """Arguments of its forward that are tuples, and how long they are."""
    views: tuple[tuple[str, tuple[Size, ...]], ...]
    """Node of its graph -> the sizes that it is called with; None for one that stays."""

    def apply(self, model: nn.Module) -> None:
        """Puts the module made anew into its place.

        Raises:
            ValueError: the module is another one.
        """
        module = model.get_submodule(self.name)
        graph = _traced(module, dict(self.constants), dict(self.lengths))
        nodes = {node.name: node for node in graph.nodes}
        for name, sizes in self.views:
            if name not in nodes:
                raise ValueError(f"it calls no {name}")
            _resize(nodes[name], sizes)
        replace(model, {id(module): _anew(module, graph)})

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        return {
            "name": self.name,
            "kind": self.kind,
            "constants": dict(self.constants),
            "lengths": dict(self.lengths),
            "views": {
                name: [list(size) if isinstance(size, tuple) else size for size in sizes]
                for name, sizes in self.views
            },
        }

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ViewPatch:
        """The patch of a recipe's entry.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is not one.
        """
        patch = cls(
            str(entry["name"]),
            str(entry["kind"]),
            tuple(entry["constants"].items()),
            tuple((name, int(length)) for name, length in entry["lengths"].items()),
            tuple((name, tuple(map(_size, sizes))) for name, sizes in entry["views"].items()),
        )
        plain = all(isinstance(value, Constant) for _, value in patch.constants)
        sizes = [size for _, sizes in patch.views for size in sizes if size is not None]
        numbers = [n for size in sizes for n in (size if isinstance(size, tuple) else (size,))]
        fits = plain and all(type(number) is int and number > 0 for number in numbers)
        if patch.as_json() != dict(entry) or not numbers or not fits or not patch.name:
            raise ValueError("an entry that contradicts itself")
        return patch


def _size(entry: Any) -> Size:
    """One size of a recipe's entry."""
    if isinstance(entry, list):
        after, before = entry
        return after, before
    return entry


Patch = AttributePatch | ViewPatch


class _Tracer(fx.Tracer):
    """Traces the forward of one module alone, with some arguments constant.

    Attributes:
        asked: the names of the nodes that the forward asked whether they are true.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        constants: Mapping[str, Constant],
        lengths: Mapping[str, int],
        decided: Sequence[bool],
    ) -> None:
        super().__init__()
        self._constants, self._lengths = constants, lengths
        self._decided = [*decided]
        self.asked: list[str] = []

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.asked.append(obj.node.name)
        return self._decided.pop(0) if self._decided else False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names: list[str] = []
        proxies: list[Any] = []
        _, *parameters = inspect.signature(root_fn).parameters.values()
        for one in parameters:
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                continue  # the example gives none
            default = () if one.default is one.empty else (one.default,)
            proxy: Any = self.create_proxy("placeholder", one.name, default, {})
            if one.name in self._constants:
                constant = self._constants[one.name]
                words = f"{one.name}: expected {constant!r}, as in the example it was pruned with"
                self.create_proxy("call_function", torch._assert, (proxy == constant, words), {})
            names.append(one.name)
            several = (proxy[i] for i in range(self._lengths.get(one.name, 0)))
            argument = tuple(several) if one.name in self._lengths else proxy
            proxies.append(self._constants.get(one.name, argument))

        def forward(root: nn.Module, *given: Any) -> Any:
            return root_fn(root, **dict(zip(names, given, strict=True)))

        return forward, [self.root, *proxies]


def _same_objects(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    return one.keys() == other.keys() and all(one[key] is other[key] for key in one)


def _traced(
    module: nn.Module, constants: Mapping[str, Constant], lengths: Mapping[str, int]
) -> fx.Graph:
    """The graph of a module's own forward.

    Raises:
        ValueError: a module made anew would not be the same.
        Exception: whatever torch.fx raises for a forward that it does not follow.
    """
    kind: Any = type(module)
    fx_module = isinstance(module, fx.GraphModule)
    own = [n for n in _OWN if getattr(kind, n) is not getattr(nn.Module, n) and not fx_module]
    if own or "forward" in vars(module) or foreign_hooks(module):
        raise ValueError(f"it has {own or 'hooks or a forward'} of its own")
    before, buffers = dict(vars(module)), dict(module._buffers)

    def follow(decided: Sequence[bool]) -> tuple[fx.Graph, list[str]]:
        tracer = _Tracer(constants, lengths, decided)
        return tracer.trace(module), tracer.asked

    try:
        graph = one_graph(follow)
        after = vars(module)
        if not (_same_objects(after, before) and _same_objects(module._buffers, buffers)):
            raise ValueError("its forward changes its attributes")
    finally:
        vars(module).clear()
        vars(module).update(before)
        module._buffers.update(buffers)
    graph._tracer_cls = None  # an unpickled one is traced by torch.fx's
    return graph


def _anew(module: nn.Module, graph: fx.Graph) -> nn.Module:
    """A module that runs a graph, with the tensors and the modules of another one."""
    new = fx.GraphModule(module, graph, class_name=type(module).__name__)
    new._modules, new._parameters = dict(module._modules), dict(module._parameters)
    new._buffers = dict(module._buffers)
    new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
    return new


def _shape_given(node: fx.Node) -> tuple[list[Any], bool]:
    """The sizes that a reshape is called with, and whether as one argument."""
    given: Any = node.args[1:]
    single = len(given) == 1 and isinstance(given[0], (tuple, list))
    return list(given[0] if single else given), single


def _left(node: fx.Node, before: Any, size: Size) -> Any:
    """What is left of a size that a node is called with."""
    if size is None or (type(before) is int and before == -1):
        return before
    if not isinstance(size, tuple):
        return size
    if type(before) is int:
        return before * size[0] // size[1]
    with node.graph.inserting_before(node):
        product = node.graph.call_function(operator.mul, (before, size[0]))
        return node.graph.call_function(operator.floordiv, (product, size[1]))


def _resize(node: fx.Node, sizes: Sequence[Size]) -> None:
    """Makes a node call its op with other sizes.

    Raises:
        ValueError: it is called in another way.
    """
    kind = _CALLS.get(node.target)
    if kind == "split":
        node.args = node.args[0], list(sizes), *node.args[2:]
        return
    given, single = _shape_given(node)
    if kind != "reshape" or len(given) != len(sizes):
        raise ValueError(f"{node.name} is called in another way")
    new = [_left(node, old, size) for old, size in zip(given, sizes, strict=True)]
    node.args = (node.args[0], tuple(new)) if single else (node.args[0], *new)


def view_patch(
    name: str, module: nn.Module, calls: Calls, views: Sequence[View]
) -> ViewPatch | None:
    """The patch that gives a module's views the sizes that are left; None where they stay.

    Args:
        name: of the module.
        module: of full size.
        calls: how it is called.
        views: in its forward, in the order of the model's graph; those of each call in turn.

    Raises:
        ValueError: it cannot be made anew.
    """
    if not any(view.smaller for view in views):
        return None
    forms = calls.forms(module)
    if not name or is_site(module) or forms is None:
        raise ValueError("it is the model, a layer, or called with more than tensors and numbers")
    was = module.training
    try:
        graph = _traced(module, *forms)
        module.training = not was
        other = _traced(module, *forms)
    except Exception as error:
        raise ValueError(f"torch.fx does not follow it: {_checks.one_line(error)}") from error
    finally:
        module.training = was
    if graph.python_code("self").src != other.python_code("self").src:
        raise ValueError("it does something else in training")
    nodes = [node for node in graph.nodes if node.target in _CALLS]
    again = len(views) // max(len(nodes), 1)
    kinds = [_CALLS[node.target] for node in nodes]
    first = list(views[: len(nodes)])
    if list(views) != first * again or kinds != [view.kind for view in first]:
        raise ValueError("its views are not those of the exported graph, or differ between calls")
    pairs = zip(nodes, first, strict=True)
    sizes = tuple((node.name, view.sizes) for node, view in pairs if view.smaller)
    for node, view in zip(nodes, first, strict=True):
        if view.smaller:
            _resize(node, view.sizes)
    constants, lengths = forms
    return ViewPatch(
        name, type(module).__name__, tuple(constants.items()), tuple(lengths.items()), sizes
    )
