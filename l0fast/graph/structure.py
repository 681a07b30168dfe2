"""What one export of a model says of its structure, kept with the model until it changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from l0fast import _checks
from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.capture import Trace, export, sites_in, train_but_norms
from l0fast.graph.parts import export_parts
from l0fast.graph.sites import without_gates
from l0fast.layers.dense_types import kind_of
from l0fast.layers.handle import gates
from l0fast.layers.serving import INDEX
from l0fast.layers.ties import GATES

_OF_GATES = {"gates", "noise", "units", "stage", "training", "controls"}
"""Attributes of layers that do not change a plain model's structure."""

Fingerprint = tuple[Any, ...]


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in (int, str, bool)


def _module_print(name: str, module: nn.Module) -> Fingerprint:
    plain = tuple(
        (key, value)
        for key, value in vars(module).items()
        if _is_plain(value) and key not in _OF_GATES
    )
    tensors = tuple(
        (key, tuple(value.shape), str(value.dtype))
        for owned in (module._parameters, module._buffers)
        for key, value in owned.items()
        if value is not None and key not in (GATES, INDEX)
    )
    kind = kind_of(module)
    return name, kind.__module__, kind.__qualname__, plain, tensors


def _form(leaf: object) -> Any:
    return (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, Tensor) else repr(leaf)


def fingerprint(model: nn.Module, example: Example) -> Fingerprint:
    """What decides a model's graph: its modules with their plain attributes and the shapes of
    their tensors, and the shapes of the example. Gates and the values of weights do not count."""
    leaves, form = tree_flatten((example.args, dict(sorted(example.kwargs.items()))))
    modules = tuple(_module_print(name, module) for name, module in model.named_modules())
    return modules, str(form), tuple(map(_form, leaves))


def _in_training(plain: nn.Module, example: Example, trace: Trace) -> tuple[bool, Trace | None]:
    """Whether layers run in training that do not run in evaluation, and its graph.

    Args:
        plain: the model, without gates; it is left in training.
        example: of what it takes.
        trace: its graph in evaluation.
    """
    ran: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, module in sites_in(plain).items()
        if not trace.counts[name]
    ]
    if not hooks:
        return False, None
    train_but_norms(plain)
    try:
        with own_randomness(plain):
            example.copy().call(plain)
    except Exception:  # perhaps it wants labels in training
        return False, None
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        return False, None
    try:
        return True, export(plain, example)
    except Exception:
        return True, None


@dataclass(frozen=True, eq=False)
class Structure:
    """The graph of a model without gates, on its example."""

    trace: Trace | None
    """Of its parts, where torch.export refuses the whole model; None where it refuses them, too."""
    failure: str
    """Why it does; "" where it does not."""
    fingerprint: Fingerprint
    more_in_training: bool = False
    """Whether layers run in training that do not run in evaluation."""
    training: Trace | None = None
    """The graph in training, where they do; None if torch.export refuses it."""

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Structure:
        """Exports a model, with its gates left out.

        Raises:
            ValueError: the model does not take the example.
        """
        made_from, refusal = fingerprint(model, example), ""
        trace: Trace | None = None
        with evaluating(model), without_gates(model, exported=True) as plain:
            try:
                trace = export(plain, example)
            except Exception as failure:
                refusal = _checks.one_line(failure)
        if refusal:
            with own_randomness(model), evaluating(model):
                example.copy().try_on(model)
        with evaluating(model), own_randomness(model), without_gates(model, exported=True) as plain:
            if refusal:
                trace = export_parts(plain, example)
            more = (False, None) if trace is None else _in_training(plain, example, trace)
        return cls(trace, refusal, made_from, *more)

    @property
    def in_parts(self) -> str:
        """That only parts of the model were exported, which, and why; "" for the whole."""
        if self.trace is None or not self.failure:
            return ""
        parts = ", ".join(map(repr, self.trace.parts))
        return f"only inside {parts}: torch.export refuses the whole model, {self.failure}"

    @property
    def added(self) -> set[str]:
        """Tensors with a number for each channel that do more than multiply, see `Trace`."""
        return set() if self.trace is None else self.trace.added

    def unseen(self, layers: Iterable[str]) -> list[str]:
        """Those of some layers that have not run, neither in evaluation nor in training."""
        traces = [trace for trace in (self.trace, self.training) if trace is not None]
        return [
            name
            for name in layers
            if not any(trace.counts[name] or name in trace.read_outside for trace in traces)
        ]

    def raw(self, layers: Iterable[str]) -> set[str]:
        """Those of some layers whose weights something reads past the layer's own call."""
        return set() if self.trace is None else self.trace.read_outside.intersection(layers)


def structure_of(model: nn.Module, example: Example) -> Structure:
    """The structure of a model with gates: as its handle has it, unless the model, or the form of
    the example, has changed since."""
    handle = gates(model)
    known: Structure | None = handle.structure
    if known is None or known.fingerprint != fingerprint(model, example):
        handle.structure = known = Structure.of(model, example)
    return known
