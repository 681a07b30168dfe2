"""Packages that only some of the library needs: missing ones are named before anything is done."""

from __future__ import annotations

from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Refuses to go on where a module of an extra is not installed.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        what = f'{", ".join(missing)}: not installed; expected pip install "l0fast[{extra}]"'
        raise ModuleNotFoundError(what, name=missing[0])
