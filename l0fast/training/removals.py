"""Checks whether the removals in a checkpoint can be repeated on the model."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from l0fast.graph.calls import Example
from l0fast.graph.tensors import part_of
from l0fast.layers.handle import gated_layers
from l0fast.pruning.rebuild import check_edit, check_patch
from l0fast.pruning.shrink import Removal, remove_
from l0fast.training.entries import Entries


def check_removals(entries: Entries, removals: object, model: nn.Module, example: Example) -> None:
    """Checks removals one by one, and carries each out on a model, in place.

    Args:
        entries: of the checkpoint.
        removals: the entry of the checkpoint.
        model: a copy of the run's model, as it was before the training.
        example: of the model's inputs.

    Raises:
        ValueError: a removal does not fit the model that the earlier removals have left.
    """
    entries.kind("removals", removals, list)
    assert isinstance(removals, list)
    for number, entry in enumerate(removals):
        place = f"removals.{number}"
        entries.names(place, entry, ("edits", "mends", "gates"))
        for name in ("edits", "mends"):
            entries.kind(f"{place}.{name}", entry[name], list)
        try:
            removal = Removal.from_json(entry)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            entries.refuse(place, f"is damaged ({type(error).__name__}: {error})")
        _check_layers(entries, place, removal, model)
        _check_gates(entries, place, entry["gates"], removal, model)
        remove_(model, removal, example, False)


def _check_layers(entries: Entries, place: str, removal: Removal, model: nn.Module) -> None:

    def differs(words: str) -> NoReturn:
        entries.refuse(place, f"is of another model ({words})")

    def part(name: str) -> nn.Module:
        try:
            return part_of(model, name)
        except AttributeError:
            differs(f"it has a {name!r}")

    for patch in removal.patches:
        check_patch(part(patch.name), patch, differs)
    for edit in removal.edits:
        check_edit(part(edit.name), edit, differs)
        if edit.gather or edit.scatter or edit.scale:
            entries.refuse(place, f"reorders or scales the units of {edit.name!r}")


def _check_gates(
    entries: Entries, place: str, gates: Any, removal: Removal, model: nn.Module
) -> None:
    """Checks that the gates that stay belong to the units that stay."""
    layers, by_name = gated_layers(model), {edit.name: edit for edit in removal.edits}
    entries.names(f"{place}.gates", gates)
    wanted: dict[str, list[int]] = {}
    for name, layer in layers.items():
        edit = by_name.get(name)
        if edit is None or layer.gates == "weight":
            continue
        units = edit.inputs if layer.gates == "input" else edit.outputs
        if units is not None:
            wanted[name] = sorted({unit // layer.units for unit in units})
    entries.equal(f"{place}.gates", gates, wanted)
