"""What takes the place of a module that a closed branch does without: plain torch.fx modules that
pass their input on, or give zeros."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.capture import is_site
from l0fast.layers.dense_types import kind_of


@dataclass(frozen=True)
class Call:
    """How a module was called on the example."""

    number: int
    """How often."""
    takes: Mapping[str, tuple[int, ...]]
    """Name of each parameter of its forward that was a tensor -> its shape."""
    before: Mapping[str, tuple[str, ...]]
    """Name of each -> the parameters before it, and it."""
    gives: tuple[int, ...] | None
    """Shape of the first tensor that it gave; None where it gave none."""
    form: tuple[int, int] | None
    """Where that tensor is in a tuple, and of how many; None where it gave the tensor alone."""
    passed: tuple[tuple[int, str], ...] = ()
    """(place in that tuple, parameter) of the other tensors that it gave as it had taken them."""


def _noted(module: nn.Module, args: Any, kwargs: Any, given: Any, number: int) -> Call:
    takes: dict[str, tuple[int, ...]] = {}
    before: dict[str, tuple[str, ...]] = {}
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
        kinds = {name: one.kind for name, one in signature.parameters.items()}
    except (TypeError, ValueError):
        bound, kinds = {}, {}
    names: list[str] = []
    for name, kind in kinds.items():
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            break
        if kind is not inspect.Parameter.KEYWORD_ONLY:
            names.append(name)
            if isinstance(bound.get(name), Tensor):
                takes[name], before[name] = tuple(bound[name].shape), tuple(names)
    if isinstance(given, Tensor):
        return Call(number, takes, before, tuple(given.shape), None)
    if type(given) in (tuple, list):
        for place, part in enumerate(given):
            if isinstance(part, Tensor):
                later = enumerate(given[place + 1 :], place + 1)
                passed = tuple((i, n) for i, one in later for n in takes if bound[n] is one)
                return Call(number, takes, before, tuple(part.shape), (place, len(given)), passed)
    return Call(number, takes, before, None, None)


def calls_of(model: nn.Module, example: Example) -> dict[str, Call]:
    """How each module of a model is called on an example."""
    calls: dict[str, Call] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, given: Any) -> None:
        if name in calls:
            calls[name] = replace(calls[name], number=calls[name].number + 1)
        else:
            calls[name] = _noted(module, args, kwargs, given, 1)

    hooks = [
        module.register_forward_hook(
            lambda module, args, kwargs, given, name=name: note(name, module, args, kwargs, given),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
    ]
    try:
        with own_randomness(model), evaluating(model):
            example.copy().call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@dataclass(frozen=True)
class StandIn:
    """What takes the place of one module; as JSON, a part of a cut (see `cuts`)."""

    name: str
    """Of the module."""
    kind: str
    """Its class."""
    takes: tuple[str, ...]
    """Parameters of its forward, up to the last one that it reads."""
    zeros: bool
    """Whether it gives zeros; else what it reads."""
    form: tuple[int, int] | None = None
    """As of `Call`; the other parts are None, but those of `passed`."""
    passed: tuple[tuple[int, str], ...] = ()
    """As of `Call`."""
    reads: str = ""
    """The parameter that it gives, or zeros like it; "" for the last of `takes`."""

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        given = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(self).items()}
        more = {"passed": {str(i): name for i, name in self.passed}, "reads": self.reads}
        return given | more if self.passed else {k: v for k, v in given.items() if k not in more}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> StandIn:
        """The stand-in of such a dict.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: it is none.
        """
        values: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in entry.items()}
        passed = values.pop("passed", {}).items()
        found = cls(**values, passed=tuple((int(place), name) for place, name in passed))
        read = {*(name for _, name in found.passed), found.reads} - {""}
        known = all(map(str.isidentifier, found.takes)) and read <= {*found.takes}
        if found.as_json() != dict(entry) or not known:
            raise ValueError("an entry that contradicts itself")
        return found

    def module(self) -> fx.GraphModule:
        """The module: it ignores all arguments but those that it reads."""
        graph = fx.Graph()
        given = {name: graph.placeholder(name, default_value=None) for name in self.takes}
        x: Any = given[self.reads or self.takes[-1]]
        graph.placeholder("*args")
        graph.placeholder("**kwargs")
        if self.zeros:
            x = graph.call_function(torch.zeros_like, (x,))
        if self.form is not None:
            place, number = self.form
            parts = {i: given[name] for i, name in self.passed} | {place: x}
            x = tuple(map(parts.get, range(number)))
        graph.output(x)
        return fx.GraphModule({}, graph, class_name="Zeros" if self.zeros else "Pass")


def stand_in(name: str, module: nn.Module, call: Call | None, zeros: bool) -> StandIn | None:
    """What can take a module's place, or None.

    It can where the module gives a tensor of the shape of one that it takes. A layer may change the
    number of its units: what reads it is gone, too.
    """
    if call is None or call.number != 1 or call.gives is None:
        return None
    kind = kind_of(module).__name__
    same = [parameter for parameter, shape in call.takes.items() if shape == call.gives]
    if not same and (not is_site(module) or call.form is not None):
        return None
    for parameter in [*same, *call.takes]:
        takes = max((call.before[one] for _, one in call.passed), key=len, default=())
        takes = max(takes, call.before[parameter], key=len)
        reads = parameter if call.passed else ""
        return StandIn(name, kind, takes, zeros, call.form, call.passed, reads)
    return None
