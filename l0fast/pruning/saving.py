"""A pruned model in one .safetensors file: its tensors, and in the metadata how it was made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from l0fast import _checks, _digest
from l0fast._files import part_folder, write_atomically
from l0fast.gating.attention import Unfused
from l0fast.graph.cuts import Cut
from l0fast.pruning.attributes import AttributePatch
from l0fast.pruning.edits import Edit
from l0fast.pruning.rebuild import rebuilt, steps_of
from l0fast.pruning.report import Report, attach_report, required_report
from l0fast.pruning.views import ViewPatch

KEY = "l0fast"
"""The metadata's entry."""
FORMAT = 2
"""With a digest of recipe and tensors; files of format 1 have none."""
EARLIER = 1
KEYS = ("attention", "attributes", "cuts", "layers", "views")
"""Parts of a report that are the recipe."""


def save_pruned(small: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a model that `prune` made to one .safetensors file, whole or not at all.

    The file's metadata has an entry "l0fast", which is JSON:
        format, sha256: a version, and the digest of the entry and the tensors;
        layers, attributes, cuts, views, attention: the new sizes (see `Report`);
        aliases: name -> name of the same tensor, since tied weights are stored once;
        frozen: names of the parameters without gradient;
        report: the rest of the report.

    Args:
        small: the pruned model, as `prune` returned it or trained further.
        path: the file. It is replaced if it exists. Its folder must exist.

    Raises:
        ValueError: the model is not pruned, its state holds something that is not a tensor, or the
            folder does not exist.

    >>> x = torch.randn(2, 8)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> small = l0fast.prune(l0fast.sparsify_(model, example_inputs=x), x, 0.5)
    >>> l0fast.save_pruned(small, "small.safetensors")
    """
    report = required_report(small)
    path = Path(path)
    if not path.parent.is_dir():
        _checks.refuse("path", str(path), f"a file in a folder that exists, not {path.parent}")
    if path.is_dir():
        _checks.refuse("path", str(path), "a file, not a folder")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    owners = _owners(small)
    for name, tensor in small.state_dict().items():
        if name not in owners:
            _checks.refuse("small", name, "only parameters and buffers in its state")
        view = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
        if tensor.numel() and view in seen:
            aliases[name] = seen[view]
        else:
            seen[view] = name
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    entries = report.as_json()
    recipe = {
        "format": FORMAT,
        **{key: entries[key] for key in KEYS},
        "aliases": aliases,
        "frozen": [name for name, p in small.named_parameters() if not p.requires_grad],
        "report": {key: value for key, value in entries.items() if key not in KEYS},
    }
    # One entry only: safetensors writes several in a random order, and equal models shall give
    # equal files.
    recipe[_digest.KEY] = _digest.of_json(json.loads(json.dumps(recipe)), tensors)
    metadata = {KEY: json.dumps(recipe)}

    def write(temporary: Path) -> None:
        # safetensors writes beside its file first, under a name that tells nobody whose it is.
        with part_folder(path) as folder:
            try:
                save_file(tensors, folder / path.name, metadata)
            except SafetensorError as error:
                raise OSError(f"{path}: cannot be written ({_checks.one_line(error)})") from None
            (folder / path.name).rename(temporary)

    write_atomically(path, write)


def _owners(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Name of a parameter or buffer -> the module that has it, and its name there."""
    return {
        f"{prefix}.{name}" if prefix else name: (module, name)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }


def _moves(model: nn.Module) -> set[str]:
    """The names, in a model's state, of the indices of its gathers and scatters."""
    return {
        f"{name}.index"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, fx.GraphModule) and type(module).__name__ in ("Gather", "Scatter")
    }


def _check_digest(recipe: dict[str, Any], version: int, tensors: dict[str, Tensor]) -> None:
    """Refuses bytes that have changed since `save_pruned` wrote them.

    Raises:
        ValueError: they have, or their digest is gone.
    """
    if (_digest.KEY in recipe) is not (version == FORMAT):
        raise ValueError(f"format {version} and its digest do not go together")
    if version == FORMAT and recipe[_digest.KEY] != _digest.of_json(recipe, tensors):
        raise _digest.Changed


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the recipe of a file.

    Raises:
        ValueError: it is not there, not whole, or not ours.
    """

    def bad(what: str) -> NoReturn:
        _checks.refuse("path", str(path), f"a file that save_pruned wrote ({what})")

    if not path.is_file():
        bad("there is no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        bad(f"it cannot be read: {error}")
    if KEY not in metadata:
        bad("this one has no recipe in its metadata")
    try:
        recipe = json.loads(metadata[KEY])
        version = recipe["format"]
        if version in (EARLIER, FORMAT):
            _check_digest(recipe, version, tensors)
            recipe.setdefault("attention", [])
            recipe.setdefault("cuts", [])
            recipe["depth"] = [Cut.from_json(entry) for entry in recipe["cuts"]]
            recipe["calls"] = [Unfused.from_json(entry) for entry in recipe["attention"]]
            recipe["edits"] = [Edit.from_json(entry) for entry in recipe["layers"]]
            recipe["patches"] = [AttributePatch.from_json(entry) for entry in recipe["attributes"]]
            recipe.setdefault("views", [])
            recipe["anew"] = [ViewPatch.from_json(entry) for entry in recipe["views"]]
            recipe["aliases"] = {str(a): str(b) for a, b in recipe["aliases"].items()}
            if not set(recipe["aliases"].values()) <= tensors.keys():
                raise ValueError("an alias of nothing")
            if not tensors.keys().isdisjoint(recipe["aliases"]):
                raise ValueError("an alias that is a tensor of its own")
            recipe["frozen"] = [str(name) for name in recipe["frozen"]]
            made = {**recipe["report"], **{key: recipe[key] for key in KEYS}}
            recipe["report"] = Report.from_json(made)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        bad(f"its recipe is damaged: {_checks.one_line(error)}")
    if version not in (EARLIER, FORMAT):
        bad(f"it has format {version!r}, this version of l0fast reads {FORMAT}")
    return tensors, recipe


def load_pruned(build_fn: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """Loads a model that `save_pruned` wrote.

    It builds the dense model, makes it as small as the pruned one, and fills in the tensors.

    Args:
        build_fn: a function without arguments that builds the dense model, as it was before
            `sparsify_`. Its weights do not matter.
        path: the file.

    Returns:
        The pruned model with its `report`. Dtypes are those of the file; device and mode (training
        or evaluation) are those of the model that build_fn returns.

    Raises:
        ValueError: the file does not exist, is not whole, was not written by `save_pruned`, or is
            of another model than build_fn's.
        TypeError: build_fn returns no module.

    >>> def build():
    ...     return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> x = torch.randn(2, 8)
    >>> small = l0fast.prune(l0fast.sparsify_(build(), example_inputs=x), x, 0.5)
    >>> l0fast.save_pruned(small, "small.safetensors")
    >>> torch.equal(l0fast.load_pruned(build, "small.safetensors")(x), small(x))
    True
    """
    path = Path(path)
    tensors, recipe = _read(path)
    model = build_fn()
    if not isinstance(model, nn.Module):
        _checks.refuse("build_fn", type(model).__name__, "a torch.nn.Module", TypeError)

    def differs(what: str) -> NoReturn:
        _checks.refuse("build_fn", type(model).__name__, f"the model of {str(path)!r}: {what}")

    steps = steps_of(*(recipe[key] for key in ("calls", "depth", "edits", "patches", "anew")))
    model = rebuilt(model, steps, differs)
    _fill_(model, tensors, recipe, differs)
    attach_report(model, recipe["report"])
    return model


def _fill_(
    model: nn.Module,
    tensors: dict[str, Tensor],
    recipe: dict[str, Any],
    differs: Callable[[str], NoReturn],
) -> None:
    """Gives a model that is as small as the file's the file's tensors; all are checked first."""
    aliases, wanted = recipe["aliases"], model.state_dict()
    have = {*tensors, *aliases}
    if have != wanted.keys():
        missing, surplus = sorted(wanted.keys() - have), sorted(have - wanted.keys())
        parts = [f"it has {surplus[0]!r}"] if surplus else []
        parts += [f"it has no {missing[0]!r}"] if missing else []
        differs(" and ".join(parts))
    frozen, owners, moves = set(recipe["frozen"]), _owners(model), _moves(model)
    for name in have:
        tensor, place = tensors[aliases.get(name, name)], wanted[name]
        if tensor.shape != place.shape:
            differs(f"its {name!r} has shape {tuple(tensor.shape)}, not {tuple(place.shape)}")
        if tensor.is_floating_point() is not place.is_floating_point():
            differs(f"its {name!r} is {tensor.dtype}, not {place.dtype}")
        if name in moves and not torch.equal(tensor, place.cpu()):
            differs(f"its {name!r} moves other units than its recipe says")
    for name, tensor in tensors.items():
        module, key = owners[name]
        place = tensor.to(wanted[name].device)
        if key in module._buffers:
            module._buffers[key] = place
        else:
            module._parameters[key] = nn.Parameter(place, name not in frozen)
    for name, other in aliases.items():
        (module, key), (owner, owned) = owners[name], owners[other]
        for kind in ("_parameters", "_buffers"):
            if key in getattr(module, kind):
                getattr(module, kind)[key] = getattr(owner, kind).get(owned, tensors[other])
