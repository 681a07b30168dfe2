"""The states of a run's random generators (PyTorch, Python, NumPy), as a checkpoint holds them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from l0fast.training.entries import Entries

MERSENNE = "MT19937"
"""The kind of NumPy's generator, unless np.random.set_bit_generator has changed it."""
WORDS = 624
"""Number of 32-bit words in the state of a Mersenne Twister."""


def rng_state(device: torch.device) -> dict[str, Any]:
    """Field of `Checkpoint` -> state of a generator, for all that a run on `device` draws from."""
    states: dict[str, Any] = {"rng": torch.get_rng_state(), "host_rng": host_rng()}
    if device.type == "cuda":
        states["cuda_rng"] = torch.cuda.get_rng_state(device)
    return states


def host_rng() -> dict[str, Any]:
    """The states of Python's `random` and of NumPy's `np.random`, as tensors and numbers.

    Returns:
        "python", and "numpy" if that is a Mersenne Twister. Each has "words" ([624] int64),
        "position" (in the words) and "gauss" (the next normal number if it is known, else None).
    """
    _, (*words, position), gauss = random.getstate()
    found: dict[str, Any] = {"python": _entry(words, position, gauss)}
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] == MERSENNE:
        gauss = float(state["gauss"]) if state["has_gauss"] else None
        found["numpy"] = _entry(state["state"]["key"].tolist(), state["state"]["pos"], gauss)
    return found


def _entry(words: list[int], position: int, gauss: float | None) -> dict[str, Any]:
    return {"words": torch.tensor(words), "position": int(position), "gauss": gauss}


def set_host_rng(state: dict[str, Any]) -> None:
    """Sets both generators to a state of `host_rng`."""
    one = state["python"]
    random.setstate((random.getstate()[0], (*one["words"].tolist(), one["position"]), one["gauss"]))
    if "numpy" in state:
        one = state["numpy"]
        words, gauss = one["words"].cpu().numpy().astype(np.uint32), one["gauss"]
        np.random.set_state((MERSENNE, words, one["position"], int(gauss is not None), gauss or 0))


def check_rng(entries: Entries, states: Mapping[str, Any], device: torch.device) -> None:
    """Refuses fields of `Checkpoint` that are not states of generators.

    The device's may be missing, or those of Python and NumPy together. NumPy's alone may be missing
    if its generator is no Mersenne Twister in this process.
    """
    entries.generator("rng", states["rng"], torch.device("cpu"))
    if device.type == "cuda" and states["cuda_rng"] is not None:
        entries.generator("cuda_rng", states["cuda_rng"], device)
    host: Any = states["host_rng"]
    if host is None:
        return
    entries.names("host_rng", host)
    entries.names("host_rng", host, host_rng())
    for name, one in host.items():
        place = f"host_rng.{name}"
        entries.names(place, one, ("words", "position", "gauss"))
        words: Any = one["words"]
        entries.tensor(f"{place}.words", words, torch.empty(WORDS, dtype=torch.int64))
        if bool((words < 0).any()) or bool((words >= 2**32).any()):
            entries.refuse(f"{place}.words", "holds a number that has more than 32 bits")
        entries.whole(f"{place}.position", one["position"], 0, WORDS)
        if one["gauss"] is not None:
            entries.real(f"{place}.gauss", one["gauss"])
