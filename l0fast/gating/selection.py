"""Which of a model's layers take part, and where each has its gates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeVar

from torch import nn
from torch.nn.utils import parametrize

from l0fast import _checks
from l0fast.gating.attention import Unfused, attention_calls, unfuse_
from l0fast.gating.recipes import Choice, by_structure, without_structure
from l0fast.gating.table import GateRow
from l0fast.graph import capture
from l0fast.graph.calls import Example, evaluating
from l0fast.graph.computed import why_computed
from l0fast.graph.sites import light_copy
from l0fast.graph.structure import Structure
from l0fast.layers.dense_types import dense_type_of
from l0fast.layers.gated import Gated

FUSED = "a fused op reads its weights"

UNFOLLOWED = (
    "so that layers are not merged with their neighbours, and gathers and zeros stay around them. "
    "Call sparsify_ on the part that computes the same whatever its input holds (a backbone, say), "
    "or name gates='input' or 'output'"
)
"""What it means that a model has no graph, and what helps."""

ModelT = TypeVar("ModelT", bound=nn.Module)
Selection = str | Callable[[str, nn.Module], bool] | Iterable[str]


def _fused(module: nn.Module) -> bool:
    """Whether a module hands its layers' weights to a fused op, past the layers' own forward."""
    if isinstance(module, nn.TransformerEncoderLayer):
        return _fused(module.self_attn)
    return isinstance(module, nn.MultiheadAttention)


def matcher(
    option: str, selection: Selection, names: list[str], barred: Mapping[str, str] | None = None
) -> Callable[..., bool]:
    """A predicate of (name, module); patterns that match no layer are refused, and so are those
    that match only some that are barred, with the reason."""
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Iterable):
        _checks.refuse(option, patterns, "glob patterns or a function of (name, layer)", TypeError)
    patterns = list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            expected = "glob patterns or a function of (name, layer)"
            _checks.refuse(option, pattern, expected, TypeError)
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            _checks.refuse(option, pattern, f"a pattern that matches one of {names}")
        if barred and barred.keys() >= set(matched):
            why = f"{matched[0]!r}: {barred[matched[0]]}"
            _checks.refuse(option, pattern, f"layers that can have gates ({why})")
    return lambda name, _layer: any(fnmatchcase(name, pattern) for pattern in patterns)


def eligible(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> Linear or conv whose own forward runs, each once, in the model's order; with those
    that can have no gates since something computes their weights."""
    inside_fused = {
        id(layer) for module in model.modules() if _fused(module) for layer in module.modules()
    }
    return {
        name: layer
        for name, layer in model.named_modules()
        if dense_type_of(_kind(layer)) is not None
        and not isinstance(layer, Gated)
        and id(layer) not in inside_fused
    }


def _kind(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, before parametrizations of its weights gave it one of its own."""
    kind = type(layer)
    return kind.__mro__[1] if parametrize.is_parametrized(layer) else kind


def computed_row(name: str, layer: nn.Module) -> GateRow:
    """What the table says of a layer whose weight something computes."""
    return GateRow(name, _kind(layer).__name__, "", 1, 0, why_computed(layer))


def row_of(name: str, layer: Any, choice: Choice) -> GateRow:
    """What the table says of a layer."""
    inputs, outputs = capture.layer_size(layer)
    sizes = {"input": inputs, "output": outputs, "weight": layer.weight.numel(), "": 0}
    gates = sizes[choice.gates] // choice.units
    if choice.share is not None:
        gates = len(set(choice.share.index))
    kind = type(layer).__name__
    return GateRow(name, kind, choice.gates, choice.units, gates, choice.reason)


def fused_rows(model: nn.Module, reasons: Mapping[str, str]) -> list[GateRow]:
    """What it says of the modules that hand their layers to a fused op, and why they do."""
    fused = ((name, module) for name, module in model.named_modules() if _fused(module))
    return [
        GateRow(name, type(module).__name__, "", 1, 0, reasons.get(name) or FUSED)
        for name, module in fused
    ]


def with_ordinary_attention(
    model: ModelT, example: Example
) -> tuple[ModelT, dict[str, Unfused], dict[str, str]]:
    """A copy, with the same parameters, whose fused attentions are ordinary where they can be:
    these, and why the others cannot."""
    with evaluating(model):
        found = attention_calls(model, example)
    calls = {name: call for name, call in found.items() if isinstance(call, Unfused)}
    reasons = {name: call for name, call in found.items() if isinstance(call, str)}
    return (unfuse_(light_copy(model), calls) if calls else model), calls, reasons  # type: ignore[return-value]


def gated_inside(name: str, layers: Iterable[str]) -> bool:
    """Whether some of `layers` are in what makes an attention fused: itself, or all around it."""
    fused = name.removesuffix(".self_attn")
    return any(layer.startswith(f"{fused}.") for layer in layers)


def run_by(model: nn.Module, layers: dict[str, nn.Module], example: Example) -> set[int]:
    """The ids of the layers that run when the model is called as in an example.

    Raises:
        ValueError: the model does not take it.
    """
    reached: set[int] = set()
    handles = [
        layer.register_forward_pre_hook(lambda module, _: reached.add(id(module)))
        for layer in layers.values()
    ]
    try:
        with evaluating(model):
            example.try_on(model)
    finally:
        for handle in handles:
            handle.remove()
    return reached


def per_layer(option: str, value: Any, names: list[str]) -> dict[str, float | None]:
    """A number for all layers, or a mapping of name patterns to numbers, as name -> number."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(names, value)
    chosen: dict[str, float | None] = dict.fromkeys(names)
    for pattern, number in value.items():
        matches = matcher(option, pattern, names)
        chosen.update({name: number for name in names if matches(name, None)})
    return chosen


class Chosen(NamedTuple):
    """Where the gates of a model go."""

    choices: dict[str, Choice]
    structure: Structure | None = None
    """What they were chosen by; None if nothing was asked."""
    note: str = ""
    """Why the structure is not known, where it is not."""


def choose(
    model: nn.Module,
    gates: str,
    layers: dict[str, nn.Module],
    example: Example | None,
    structure: Structure | None = None,
) -> Chosen:
    """Where the gates of some layers go; with the model's structure, where it is known."""
    if gates != "auto":
        return Chosen({name: Choice(gates) for name in layers})
    if example is None:
        note = (
            "each layer has gates by itself, since the model's structure is not known: pass "
            "example_inputs"
        )
        return Chosen(without_structure(layers), note=note)
    structure = structure or Structure.of(model, example)
    if structure.trace is None:
        note = (
            f"each layer has gates by itself: torch.export refuses the model, {structure.failure}"
        )
        return Chosen(without_structure(layers), structure, note)
    note = f"layers are followed {structure.in_parts}" if structure.in_parts else ""
    return Chosen(by_structure(model, structure.trace, layers), structure, note)
