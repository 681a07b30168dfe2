"""A dense model made as small as a recipe says, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn

from l0fast import _checks
from l0fast.gating.attention import Unfused, unfuse_
from l0fast.graph.capture import can_be_edited, layer_size
from l0fast.graph.cuts import Cut, cut_
from l0fast.graph.tensors import part_of
from l0fast.layers.dense_types import kind_of
from l0fast.pruning.attributes import AttributePatch, sizes_of
from l0fast.pruning.edits import Edit, apply
from l0fast.pruning.views import ViewPatch

Differs = Callable[[str], NoReturn]
Step = Unfused | Cut | Edit | AttributePatch | ViewPatch


def steps_of(
    calls: Sequence[Unfused],
    cuts: Sequence[Cut],
    edits: Sequence[Edit],
    patches: Sequence[AttributePatch],
    views: Sequence[ViewPatch],
) -> list[Step]:
    """The steps of a recipe, in order: those of a model pruned twice name what the first left."""
    steps: list[Step] = [*calls]
    done = 0, 0, 0
    for cut in cuts:
        ends = cut.after
        for some, first, last in zip((edits, patches, views), done, ends, strict=True):
            steps += some[first:last]
        steps.append(cut)
        done = ends
    return [*steps, *edits[done[0] :], *patches[done[1] :], *views[done[2] :]]


def check_edit(layer: nn.Module, edit: Edit, differs: Differs) -> None:
    """Tells what a layer, or a tensor, that an edit is for should be and is not."""
    if not can_be_edited(layer) or kind_of(layer).__name__ != edit.kind:
        differs(f"its {edit.name!r} is a {edit.kind}, not a {type(layer).__name__}")
    if layer_size(layer) != edit.size:
        sizes = f"{edit.size} inputs and outputs, not {layer_size(layer)}"
        differs(f"its {edit.name!r} has {sizes}")


def check_patch(module: nn.Module, patch: AttributePatch, differs: Differs) -> None:
    """Tells what a module whose attribute follows a size should be and is not."""
    value = patch.value[1]
    if type(module).__name__ != patch.kind or dict(sizes_of(module)).get(patch.attribute) != value:
        differs(f"its {patch.name or 'root'!r} is a {patch.kind} with {patch.attribute}={value}")


def rebuilt(model: nn.Module, steps: Sequence[Step], differs: Differs) -> nn.Module:
    """The model after some steps, each checked first; it is changed in place.

    Args:
        model: dense.
        steps: see `steps_of`.
        differs: is told what the model should have and has not.
    """

    def part(what: str, name: str) -> Any:
        try:
            return part_of(model, name)
        except AttributeError:
            differs(f"it has a {what} {name!r}")

    for step in steps:
        if isinstance(step, Unfused):
            attention = part("module", step.name)
            if type(attention) is not nn.MultiheadAttention:
                got = type(attention).__name__
                differs(f"its {step.name!r} is a MultiheadAttention, not a {got}")
            found, sizes = ((m.embed_dim, m.num_heads) for m in (attention, step))
            if found != sizes:
                differs(f"its {step.name!r} has embed_dim and num_heads {sizes}, not {found}")
            model = unfuse_(model, {step.name: step})
        elif isinstance(step, Cut):
            for stand in step.modules:
                got = kind_of(part("module", stand.name)).__name__
                if got != stand.kind:
                    differs(f"its {stand.name!r} is a {stand.kind}, not a {got}")
            for holder, places in step.dropped:
                number = len(part("list of modules", holder)._modules)
                if number <= places[-1]:
                    differs(f"its {holder!r} has more than {number} modules")
            model = cut_(model, step)
        elif isinstance(step, Edit):
            check_edit(part("layer", step.name), step, differs)
            model = apply(model, [step])
        elif isinstance(step, ViewPatch):
            module = part("module", step.name)
            if type(module).__name__ != step.kind:
                differs(f"its {step.name!r} is a {step.kind}, not a {type(module).__name__}")
            try:
                model = apply(model, [], [step])
            except Exception as error:
                words = f"is another one ({_checks.one_line(error)})"
                differs(f"the forward of its {step.name!r} {words}")
        else:
            check_patch(part("module", step.name), step, differs)
            model = apply(model, [], [step])
    return model
