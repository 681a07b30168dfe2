"""Modules whose own code computes a size that no attribute holds: made anew, with the size that is
left.

As in `B, N, C = x.shape; ...; x.reshape(B, N, C)`, where C is what enters and the units inside have
become fewer. What comes out is a torch.fx module of the same parameters and the same modules inside,
which copies, pickles, compiles and exports without l0fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx._symbolic_trace import _assert_is_none

from l0fast.graph.capture import is_site
from l0fast.graph.sites import replace
from l0fast.graph.views import View
from l0fast.layers.hooks import foreign_hooks
from l0fast.pruning.attributes import AttributePatch

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

Constant = None | bool | str


@dataclass(frozen=True)
class ViewPatch:
    """A module that is made anew with other sizes in its views; as JSON, one entry of the recipe."""

    name: str
    kind: str
    """Its class."""
    constants: tuple[tuple[str, Constant], ...]
    """Arguments of its forward that are always the same, and their values."""
    lengths: tuple[tuple[str, int], ...]
    """Arguments of its forward that are tuples, and how long they are."""
    views: tuple[tuple[str, tuple[int | None, ...]], ...]
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
            "views": {name: list(sizes) for name, sizes in self.views},
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
            tuple((name, tuple(sizes)) for name, sizes in entry["views"].items()),
        )
        plain = all(isinstance(value, Constant) for _, value in patch.constants)
        numbers = [size for _, sizes in patch.views for size in sizes if size is not None]
        fits = plain and all(type(size) is int and size > 0 for size in numbers)
        if patch.as_json() != dict(entry) or not numbers or not fits or not patch.name:
            raise ValueError("an entry that contradicts itself")
        return patch


Patch = AttributePatch | ViewPatch


class _Tracer(fx.Tracer):
    """Traces the forward of one module alone, with some arguments constant."""

    def __init__(self, constants: Mapping[str, Constant], lengths: Mapping[str, int]) -> None:
        super().__init__()
        self._constants, self._lengths = constants, lengths

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
            proxy = self.create_proxy("placeholder", one.name, default, {})
            if one.name in self._constants:
                constant = self._constants[one.name]
                words = f"{one.name}: expected {constant!r}, as in the example it was pruned with"
                if constant is None:
                    self.create_proxy("call_function", _assert_is_none, (proxy, words), {})
                else:
                    self.create_proxy(
                        "call_function", torch._assert, (proxy == constant, words), {}
                    )
            names.append(one.name)
            proxies.append(self._constants.get(one.name, proxy))

        def forward(root: nn.Module, *given: Any) -> Any:
            return root_fn(root, **dict(zip(names, given, strict=True)))

        return forward, [self.root, *proxies]

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if obj.node.op == "placeholder" and obj.node.name in self._lengths:
            return iter([obj[i] for i in range(self._lengths[obj.node.name])])
        return super().iter(obj)


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
    if own or "forward" in vars(module) or module._buffers or foreign_hooks(module):
        raise ValueError(f"it has {own or 'hooks, buffers or a forward'} of its own")
    before = dict(vars(module))
    try:
        graph = _Tracer(constants, lengths).trace(module)
        after = vars(module)
        if after.keys() != before.keys() or any(after[key] is not before[key] for key in before):
            raise ValueError("its forward changes its attributes")
    finally:
        vars(module).clear()
        vars(module).update(before)
    graph._tracer_cls = None  # an unpickled one is traced by torch.fx's
    return graph


def _anew(module: nn.Module, graph: fx.Graph) -> nn.Module:
    """A module that runs a graph, with the parameters and the modules of another one."""
    new = fx.GraphModule(module, graph, class_name=type(module).__name__)
    new._modules, new._parameters = dict(module._modules), dict(module._parameters)
    return new


def _shape_given(node: fx.Node) -> tuple[list[Any], bool]:
    """The sizes that a reshape is called with, and whether as one argument."""
    given: Any = node.args[1:]
    single = len(given) == 1 and isinstance(given[0], (tuple, list))
    return list(given[0] if single else given), single


def _resize(node: fx.Node, sizes: Sequence[int | None]) -> None:
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
    pairs = zip(given, sizes, strict=True)
    new = [old if size is None or (type(old) is int and old == -1) else size for old, size in pairs]
    node.args = (node.args[0], tuple(new)) if single else (node.args[0], *new)


class Calls:
    """How modules are called on the example: with which arguments, of which kinds."""

    def __init__(self) -> None:
        self._seen: dict[nn.Module, list[dict[str, Any]]] = {}

    def __contains__(self, module: nn.Module) -> bool:
        return module in self._seen

    @contextmanager
    def of(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Notes the calls of some modules."""
        hooks = [
            module.register_forward_pre_hook(self._note, with_kwargs=True) for module in modules
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
        except (TypeError, ValueError):
            return
        bound.apply_defaults()
        self._seen.setdefault(module, []).append(dict(bound.arguments))

    def forms(self, module: nn.Module) -> tuple[dict[str, Constant], dict[str, int]] | None:
        """The arguments that are constants, and those that are tuples; None where one is neither,
        nor a tensor or a number."""
        calls = self._seen.get(module, [])
        constants: dict[str, Constant] = {}
        lengths: dict[str, int] = {}
        for name, one in inspect.signature(module.forward).parameters.items() if calls else ():
            given = [call[name] for call in calls]
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                if any(given):
                    return None
            elif all(isinstance(value, Constant) for value in given):
                if len(set(given)) > 1:
                    return None
                constants[name] = given[0]
            elif all(isinstance(value, (tuple, list)) for value in given):
                if len({len(value) for value in given}) > 1:
                    return None
                lengths[name] = len(given[0])
            elif not all(isinstance(value, (torch.Tensor, int, float)) for value in given):
                return None
        return (constants, lengths) if calls else None


def view_patch(
    name: str, module: nn.Module, calls: Calls, views: Sequence[View]
) -> ViewPatch | None:
    """The patch that gives a module's views the sizes that are left, or None where there is none.

    Args:
        name: of the module.
        module: of full size.
        calls: how it is called.
        views: in its forward, in the order of the model's graph; those of each call in turn.
    """
    forms = calls.forms(module)
    if not name or is_site(module) or forms is None:
        return None
    was = module.training
    try:
        graph = _traced(module, *forms)
        module.training = not was
        other = _traced(module, *forms)
        if str(graph.python_code("self").src) != str(other.python_code("self").src):
            return None  # it does something else in training
        nodes = [node for node in graph.nodes if node.target in _CALLS]
        again = len(views) // max(len(nodes), 1)
        if not nodes or list(views) != list(views[: len(nodes)]) * again:
            return None
        changes = [
            (node, view.sizes) for node, view in zip(nodes, views, strict=False) if view.smaller
        ]
        if any(_CALLS[node.target] != view.kind for node, view in zip(nodes, views, strict=False)):
            return None
        for node, sizes in changes:
            _resize(node, sizes)
    except Exception:  # torch.fx does not follow it
        return None
    finally:
        module.training = was
    constants, lengths = (tuple(form.items()) for form in forms)
    sizes = tuple((node.name, sizes) for node, sizes in changes)
    return ViewPatch(name, type(module).__name__, constants, lengths, sizes) if sizes else None
