"""The user's own data as arrays in one file: a .npz of NumPy, or a .pt of torch.save."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from l0fast import _checks
from l0fast.data.formats import Split, hold_out_test

SUFFIXES = (".npz", ".pt")
WHOLE = {"inputs", "targets"}
APART = {"train_inputs", "train_targets", "test_inputs", "test_targets"}
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""PyTorch has few operations for these types, so they are converted to int64."""
FEW_CLASSES = 1000
"""More classes than this, and than examples, are numbers that stand for something else."""
WANTED = f"a file .npz or .pt with the arrays {', '.join(sorted(WHOLE))}, or with {sorted(APART)}"


def load(path: str, task: str | None) -> tuple[Split, Split, int, str]:
    """Reads (train, test, number of outputs, task) from a file.

    The inputs become float32 and are not normalised. If the file has no test arrays, a fifth of the
    examples is the test, the same fifth for every seed.

    Args:
        path: of the file.
        task: as in `TrainerSettings`. None takes it from the targets: floating numbers are a
            regression, booleans (or a matrix of 0 and 1) are labels, other whole numbers are
            classes.

    Raises:
        ValueError: the file is of another kind, or its arrays do not fit each other or the task.
    """
    found = _read(path)
    if found.keys() == WHOLE:
        inputs, targets = found["inputs"], found["targets"]
        _refuse_lengths(path, "", inputs, targets)
        if len(inputs) < 2:
            _refuse(path, "this one has a single example, so there is none to test on")
        kept, tested = (torch.tensor(part) for part in hold_out_test(len(inputs)))
        parts = {
            "train": (inputs[kept], targets[kept]),
            "test": (inputs[tested], targets[tested]),
        }
    elif found.keys() == APART:
        parts = {n: (found[f"{n}_inputs"], found[f"{n}_targets"]) for n in ("train", "test")}
        for name, (inputs, targets) in parts.items():
            _refuse_lengths(path, f"{name}_", inputs, targets)
        for name in sorted(WHOLE):
            _refuse_unlike(path, f"train_{name}", f"test_{name}", found)
    else:
        _refuse(path, f"this one has {sorted(found)}")
    every = torch.cat([targets for _, targets in parts.values()])
    task = task or _task_of(every)
    train, test = (_split(path, task, *part) for part in parts.values())
    if task != "classification":
        return train, test, math.prod(every.shape[1:]), task
    classes = 1 + int(every.max())
    if classes > max(len(every), FEW_CLASSES):
        many = f"a class is number {classes - 1:,} of {len(every):,} examples"
        _refuse(path, f"{many}: number the classes from 0, or name --task regression")
    return train, test, classes, task


def digest(path: str) -> str:
    """A digest that tells a file from another one with the same shapes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse(path: str, problem: str) -> NoReturn:
    _checks.refuse("dataset", path, f"{WANTED} ({problem})")


def _read(path: str) -> dict[str, Tensor]:
    """Name -> array of a file; no code in it is run."""
    if not Path(path).is_file():
        _refuse(path, "there is no such file")
    try:
        if path.endswith(".npz"):
            with np.load(path, allow_pickle=False) as file:
                found: Any = {name: torch.from_numpy(file[name]) for name in file.files}
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        _refuse(path, _checks.one_line(error))
    if not isinstance(found, dict) or not all(isinstance(one, Tensor) for one in found.values()):
        _refuse(path, f"this one holds a {type(found).__name__} that is not a dict of tensors")
    for name, array in found.items():
        if array.layout != torch.strided or array.is_complex() or array.is_quantized:
            _refuse(path, f"its {name} are {array.dtype}, {array.layout}")
    return {n: one.long() if one.dtype in UNSIGNED else one for n, one in found.items()}


def _refuse_lengths(path: str, name: str, inputs: Tensor, targets: Tensor) -> None:
    empty = not (inputs.numel() and targets.numel())
    if empty or inputs.dim() < 2 or targets.dim() < 1 or len(inputs) != len(targets):
        shapes = f"{tuple(inputs.shape)} and {tuple(targets.shape)}"
        _refuse(path, f"its {name}inputs and {name}targets are {shapes}")


def _refuse_unlike(path: str, name: str, other: str, found: dict[str, Tensor]) -> None:
    """Refuses test arrays whose examples differ from the training's in shape or kind."""
    wanted, got = found[name], found[other]
    if got.shape[1:] != wanted.shape[1:]:
        shape = f"(N, {', '.join(map(str, wanted.shape[1:]))})".replace(", )", ",)")
        beside = f"as {name} of {path!r}, which is {tuple(wanted.shape)}"
        _checks.refuse(other, f"shape {tuple(got.shape)}", f"shape {shape}, {beside}")
    if "targets" in name and _kind(got) != _kind(wanted):
        beside = f"as {name} of {path!r}, which is {wanted.dtype}"
        _checks.refuse(other, f"{got.dtype}", f"{_kind(wanted)}, {beside}")


def _kind(array: Tensor) -> str:
    """The kind of its entries, in words."""
    if array.is_floating_point():
        return "floating numbers"
    return "booleans" if array.dtype == torch.bool else "whole numbers"


def _task_of(targets: Tensor) -> str:
    """The task for targets of this kind."""
    if targets.is_floating_point():
        return "regression"
    labels = targets.dtype == torch.bool or (targets.dim() > 1 and bool((targets >> 1 == 0).all()))
    return "multilabel" if labels else "classification"


def _split(path: str, task: str, inputs: Tensor, targets: Tensor) -> Split:
    """The split, with inputs as float32 and targets as the task needs them."""
    inputs = inputs.to(torch.float32)
    if task != "classification":
        return Split(inputs, targets.to(torch.float32).reshape(len(targets), -1))
    if targets.is_floating_point() or targets.dim() > 1:
        kind = f"{targets.dtype} of shape {tuple(targets.shape)}"
        _refuse(path, f"its targets are {kind}, which cannot be classes; name another --task")
    return Split(inputs, targets.to(torch.int64))
