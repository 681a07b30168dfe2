"""Layers with adapters, such as LoRA, beside them: the modules around them say their sizes, too."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from l0fast.pruning.attributes import AttributePatch
from l0fast.pruning.edits import Edit


def sizes_around(model: nn.Module, edits: Iterable[Edit]) -> list[AttributePatch]:
    """The patches of modules around layers that get smaller: later adapters go by their sizes.

    Args:
        model: that the edits are for.
        edits: of its layers.
    """
    patches: list[AttributePatch] = []
    for edit in edits:
        path, _, name = edit.name.rpartition(".")
        if name != "base_layer":
            continue
        around = model.get_submodule(path)
        parts = (edit.inputs, edit.outputs), (edit.gather, edit.scatter)
        keys = ("in_features", "out_features")
        for key, before, kept, moved in zip(keys, edit.size, *parts, strict=True):
            after = moved[1] if moved else before if kept is None else len(kept)
            if vars(around).get(key) == before != after:
                patches.append(AttributePatch(path, type(around).__name__, key, (after, before)))
    return patches
