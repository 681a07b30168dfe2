"""Attributes of modules that must follow a size: an int, or a tuple or list of them; those of an
object that a module holds, too."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn

Sizes = int | tuple[int, ...]
"""What an attribute may hold: one size, or one of each part of a split."""


def sizes_in(value: object) -> Sizes | None:
    """The sizes that an attribute holds, a list as a tuple; None if it is nothing of the kind."""
    if type(value) is int:
        return value
    if type(value) in (tuple, list) and all(type(part) is int for part in value):  # type: ignore[attr-defined]
        return tuple(value)  # type: ignore[arg-type]
    return None


@functools.cache
def _names_in(kind: type[nn.Module]) -> frozenset[str]:
    """The names of attributes that the methods of a class use, but for those that build it."""
    found: set[str] = set()

    def add(code: CodeType) -> None:
        found.update(code.co_names)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                add(constant)

    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            code = getattr(inspect.unwrap(method) if callable(method) else None, "__code__", None)
            if isinstance(code, CodeType) and name != "__init__":
                add(code)
    return frozenset(found)


def sizes_of(module: nn.Module) -> Iterator[tuple[str, Sizes]]:
    """The attributes of a module that hold sizes, and "config.width": those of an object that it
    holds, which its forward asks for them."""
    for key, value in vars(module).items():
        sizes = sizes_in(value)
        if sizes is not None:
            yield key, sizes
        elif type(getattr(value, "__dict__", None)) is dict and not callable(value):
            if isinstance(value, Tensor) or key not in _names_in(type(module)):
                continue
            for inner, held in vars(value).items():
                sizes = sizes_in(held)
                if sizes is not None and inner in _names_in(type(module)):
                    yield f"{key}.{inner}", sizes


@dataclass(frozen=True)
class AttributePatch:
    """An attribute of a module that must follow a size; as JSON, one entry of the recipe."""

    name: str
    """Of the module, "" for the model itself."""
    kind: str
    """Its class."""
    attribute: str
    """See `sizes_of`."""
    value: tuple[Sizes, Sizes]
    """(after, before)."""

    @property
    def held(self) -> str:
        """The module's own attribute: the first name."""
        return self.attribute.partition(".")[0]

    def apply(self, model: nn.Module) -> None:
        """Sets the attribute, in place; a list stays a list.

        Of an object that the module holds it gets a copy: other modules may hold the same one.
        """
        attributes, after = vars(model.get_submodule(self.name)), self.value[0]
        name = self.attribute.rpartition(".")[2]
        if self.held != name:
            attributes[self.held] = copy.copy(attributes[self.held])
            attributes = vars(attributes[self.held])
        attributes[name] = list(after) if type(attributes.get(name)) is list else after  # type: ignore[arg-type]

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
