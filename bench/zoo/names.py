"""From the name of a model to its entry: of the zoo, of the held-out list, or of a library."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from bench.zoo import small
from bench.zoo.held_out import SPECIAL
from bench.zoo.models import ZOO, Entry

LIBRARIES: dict[str, tuple[Callable[[str], bool], Callable[[str], Entry], str]] = {
    "timm": (small.in_timm, small.of_timm, "a model of timm.list_models()"),
    "torchvision": (
        small.in_torchvision,
        small.of_torchvision,
        "a model of torchvision.models.list_models()",
    ),
    "transformers": (
        small.in_transformers,
        small.of_transformers,
        "a class of a model's configuration or a model type of transformers",
    ),
    "diffusers": (small.in_diffusers, small.of_diffusers, "a class of a model of diffusers"),
}
"""Library -> whether it knows a name, the model of that name, and what names it knows."""


def library_of(name: str) -> str:
    """The library that a model needs."""
    if name in ZOO:
        return ZOO[name].library
    library = name.partition("/")[0]
    return "torch" if library == "own" else library


def check(name: str) -> None:
    """That there is a model of that name; not asked of a library that is not installed.

    Raises:
        ValueError: there is none.
    """
    if name in ZOO or name in SPECIAL:
        return
    library, _, model = name.partition("/")
    if library not in LIBRARIES or not model:
        expected = f"a name of --list, or one of {', '.join(LIBRARIES)} / a model"
        raise ValueError(f"names: got {name!r}; expected {expected}")
    knows, _, names = LIBRARIES[library]
    if importlib.util.find_spec(library) is not None and not knows(model):
        raise ValueError(f"names: got {name!r}; expected {names}")


def entry_of(name: str) -> Entry:
    """The model of that name, and its input.

    Raises:
        ValueError: there is none.
    """
    check(name)
    if name in ZOO:
        return ZOO[name]
    if name in SPECIAL:
        return SPECIAL[name]()
    library, _, model = name.partition("/")
    return LIBRARIES[library][1](model)
