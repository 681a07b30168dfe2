"""Attributes of modules that must follow a size: an int, or a tuple or list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

Sizes = int | tuple[int, ...]
"""What an attribute may hold: one size, or one of each part of a split."""


def sizes_in(value: object) -> Sizes | None:
    """The sizes that an attribute holds, a list as a tuple; None if it is nothing of the kind."""
    if type(value) is int:
        return value
    if type(value) in (tuple, list) and all(type(part) is int for part in value):  # type: ignore[attr-defined]
        return tuple(value)  # type: ignore[arg-type]
    return None


@dataclass(frozen=True)
class AttributePatch:
    """An attribute of a module that must follow a size; as JSON, one entry of the recipe."""

    name: str
    """Of the module, "" for the model itself."""
    kind: str
    """Its class."""
    attribute: str
    value: tuple[Sizes, Sizes]
    """(after, before)."""

    def apply(self, model: nn.Module) -> None:
        """Sets the attribute, in place; a list stays a list."""
        attributes, after = vars(model.get_submodule(self.name)), self.value[0]
        is_list = type(attributes.get(self.attribute)) is list
        attributes[self.attribute] = list(after) if is_list else after  # type: ignore[arg-type]

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        value = [list(sizes) if isinstance(sizes, tuple) else sizes for sizes in self.value]
        return {**vars(self), "value": value}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> AttributePatch:
        """The patch of a recipe's entry.

        Raises:
            ValueError, TypeError, KeyError: it is not one.
        """
        after, before = (
            tuple(int(size) for size in sizes) if isinstance(sizes, list) else int(sizes)
            for sizes in entry["value"]
        )
        patch = cls(
            str(entry["name"]), str(entry["kind"]), str(entry["attribute"]), (after, before)
        )
        one, other = ((s,) if isinstance(s, int) else s for s in (after, before))
        fits = isinstance(after, int) == isinstance(before, int) and len(one) == len(other)
        fits = fits and one != other and all(0 < a <= b for a, b in zip(one, other, strict=False))
        if patch.as_json() != dict(entry) or not fits:
            raise ValueError("an entry that contradicts itself")
        return patch
