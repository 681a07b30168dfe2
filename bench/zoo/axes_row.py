"""One family of Hugging Face with gates on all its axes, closed, pruned, compared; as JSON.

Twice: once with other numbers of units in each layer, one block and one more branch closed, which
is compared in float64 on fresh inputs and in what it generates; once with half of each layer and
one block closed, as a configuration can hold it, which goes into a folder and comes back.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

import l0fast
from bench.zoo.families import FAMILIES, Family
from bench.zoo.measure import CLOSED, FRACTIONAL, untrained
from l0fast.graph.calls import Example
from l0fast.graph.compare import relative_error, tensors_of
from l0fast.graph.cuts import Cut
from l0fast.integrations.transformers import load_pretrained, save_pretrained
from l0fast.layers.experts import CHILD
from l0fast.layers.handle import gated_layers
from l0fast.layers.linear import L0Linear
from l0fast.layers.rms_norm import GatedRMSNorm
from l0fast.pruning.precision import float64_for_float32, widened

AXES = ("depth", "hidden", "heads", "FFN", "experts", "channels")
FRESH = ((3, 17), (1, 7), (2, 12))
"""Rows and lengths of the fresh inputs."""
NEW_TOKENS = 8
SOME = (0.25, 0.75)
"""The least and the largest share of a layer's gates that is closed where numbers differ."""
PLAIN, OWN = "from_pretrained", "load_pretrained"
SAME = 1e-4
"""The largest relative error of what a folder gives back in float32."""


@dataclass
class Row:
    """The results of one family."""

    name: str
    seed: int
    failure: str = ""
    commit: str = ""
    axes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Axis -> gates whose units went, closed gates, all gates."""
    gated: float = 0.0
    """The share of the parameters that goes if all gates close."""
    params: tuple[int, int] = (0, 0)
    """(after, before)."""
    error: float = math.inf
    """Largest relative error on fresh inputs in float64."""
    cache: bool | None = None
    """Whether it generates the same tokens with a cache; None: it generates none."""
    no_cache: bool | None = None
    folder: str = ""
    """What loads the folder of the even model: `PLAIN` or `OWN`; or why it is refused."""
    folder_reason: str = ""
    """Why plain `from_pretrained` does not load it."""
    folder_error: float = math.inf
    seconds: float = 0.0
    """Of CPU, for all of it."""
    kept: dict[str, list[str]] = field(default_factory=dict)
    """Why something has no gates, or stays though they are closed -> its names."""
    last_lines: list[str] = field(default_factory=list)
    """Of what the process printed, where it failed."""


def gates_once(model: nn.Module) -> dict[str, tuple[Any, list[str]]]:
    """Name -> (gated layer, names of all that have its gates)."""
    found: dict[int, tuple[Any, list[str]]] = {}
    for name, layer in gated_layers(model).items():
        found.setdefault(id(layer.log_alpha), (layer, []))[1].append(name)
    return {names[0]: (layer, names) for layer, names in found.values()}


def axis_of(layer: Any) -> str:
    """What the gates of a layer are on."""
    if layer.gates in ("branch", "expert"):
        return {"branch": "depth", "expert": "experts"}[layer.gates]
    if isinstance(layer, GatedRMSNorm):
        return "hidden"
    if not isinstance(layer, L0Linear):
        return "channels"
    return "heads" if layer.units > 1 else "FFN"


def options_of(model: nn.Module, example: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The options of `sparsify_` for the axes that a model has; and why something has no gates."""
    options: dict[str, Any] = {"depth": True, "hidden": True, "experts": True}
    kept: dict[str, list[str]] = {}
    try:
        table = l0fast.sparsify_(model, example_inputs=example, dry_run=True, **options)
    except ValueError as refusal:
        kept[str(refusal)] = ["hidden"]
        del options["hidden"]
        table = l0fast.sparsify_(model, example_inputs=example, dry_run=True, **options)
    for row in table.layers:
        if not row.gates:
            kept.setdefault(row.reason, []).append(row.name)
    gated = [row for row in table.layers if row.gates]
    norms = (row.kind for row in gated if row.gates == "output" and "Conv" not in row.kind)
    found = {"depth": "Branch", "hidden": next(norms, None), "experts": "Experts"}
    kinds = {row.kind for row in gated}
    return {option: True for option in options if found[option] in kinds}, kept


def _first_number(name: str) -> int:
    found = re.search(r"\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else 0


def close(model: nn.Module, even: bool) -> None:
    """Closes block 1, and a part of all other gates; with `even` the same number in layers that are
    alike, and block 1 only if it can go as a whole, else also the first branch of block 2."""
    branches: dict[int, int] = {}
    with torch.no_grad():
        for name, (layer, _) in gates_once(model).items():
            one, number = layer.log_alpha, layer.log_alpha.numel()
            one.uniform_(*FRACTIONAL)
            if axis_of(layer) == "depth":
                block = _first_number(name)
                branches[block] = branches.get(block, 0) + 1
                extra = not even and block == 2 and branches[block] == 1
                whole = block == 1 and (not even or layer.branch.block is not None)
                one.fill_(CLOSED if whole or extra else 0.5)
                continue
            share = 0.5 if even else float(torch.empty(()).uniform_(*SOME))
            closed = min(max(1, round(share * number)), number - _least(layer))
            one.view(-1)[torch.randperm(number)[:closed]] = CLOSED


def _least(layer: Any) -> int:
    return max(1, getattr(getattr(layer, "mixture", None), "least", 1))


def _count(row: Row, model: nn.Module, report: Any) -> None:
    """How many gates of each axis are closed, and of how many the units are gone."""
    cuts = [Cut.from_json(entry) for entry in report.cuts]
    old = cuts[0].old if cuts else str
    sites, edits = ({old(one["name"]): one for one in of} for of in (report.sites, report.layers))
    lost = {
        one.mixture.path(CHILD): one.mixture.number - len(one.kept)
        for cut in cuts
        for one in cut.experts
    }
    shallow = {name for cut in cuts for name in cut.branches}
    for name, (layer, names) in gates_once(model).items():
        axis, shut = axis_of(layer), int((layer.log_alpha == CLOSED).sum())
        if axis == "depth":
            gone = shut if name.removesuffix(".branch") in shallow else 0
        elif all(cut.takes(one) for cut in cuts for one in names) and cuts:
            gone = shut
        elif axis == "experts":
            gone = lost.get(name, 0)
        else:
            left = [one for one in names if not any(cut.takes(one) for cut in cuts)]
            gone = min(_gone(sites[one], edits.get(one), layer, shut) for one in left)
        before = row.axes.get(axis, (0, 0, 0))
        row.axes[axis] = before[0] + gone, before[1] + shut, before[2] + layer.log_alpha.numel()
        if gone < shut:
            reason = sites[name]["reason"] if name in sites else "; ".join(report.notes)
            row.kept.setdefault(reason, []).append(f"{name} ({shut - gone} closed gates)")


def _gone(site: dict[str, Any], edit: dict[str, Any] | None, layer: Any, shut: int) -> int:
    """How many of a layer's closed gates have lost their units, with no gather in their place."""
    inside, moved = ("in", "gather") if layer.gates == "input" else ("out", "scatter")
    if edit is None or edit[moved] is not None:
        return 0
    return min(shut, (site[inside][1] - site[inside][0]) // layer.units)


def _gated_share(model: nn.Module, example: Any) -> float:
    """The share of the parameters that goes if all gates close."""
    closed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in gated_layers(closed).values():
            layer.log_alpha.fill_(CLOSED)
    constraint = l0fast.DensityConstraint(closed, 1.0, measure="params", example_inputs=example)
    return 1 - constraint.realised()["model"]


def _wide(family: Family, rows: int, length: int) -> Example:
    return widened(Example.of(family.batch(rows, length)), torch.float64)


def _error(family: Family, small: nn.Module, model: nn.Module) -> float:
    found = 0.0
    for rows, length in FRESH:
        example = _wide(family, rows, length)
        with torch.no_grad():
            pair = [tensors_of(example.copy().call(one)) for one in (small, model)]
        found = max(found, relative_error(*pair))
    return found


def _written(family: Family, model: Any, cache: bool) -> Tensor:
    """What a model generates."""
    given = dict(_wide(family, 2, 6).kwargs)
    start = given.pop("decoder_input_ids", None)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "use_cache": cache}
    if start is not None:
        options |= {"decoder_input_ids": start[:, :1], "decoder_start_token_id": 1}
    generate: Any = vars(GenerationMixin)["generate"]  # Whisper's own is of long sounds
    return generate(model, **given, **options)


def _folder(row: Row, family: Family, small: Any, folder: Path) -> None:
    """Writes a pruned model into a folder, and loads it."""
    example = family.batch(2, 9)
    try:
        row.folder_reason = save_pretrained(small, folder, example)
    except (ValueError, TypeError) as refusal:
        row.folder, row.folder_reason = "refused", str(refusal)
        return
    row.folder = OWN if row.folder_reason else PLAIN
    kind: Any = type(small)
    loaded = load_pretrained(folder) if row.folder_reason else kind.from_pretrained(folder).eval()
    with torch.no_grad():
        pair = [tensors_of(Example.of(example).call(one)) for one in (loaded, small)]
    row.folder_error = relative_error(*pair)


def _pruned(gated: nn.Module, family: Family, even: bool) -> Any:
    """A copy of a gated model whose gates are closed, and what is left of it."""
    model = copy.deepcopy(gated)
    close(model, even)
    model.eval()
    example = dict(_wide(family, 2, 12).kwargs)
    return model, l0fast.prune(model, example, uniform=even).eval()


def measure(name: str, seed: int = 0) -> Row:
    """Measures one row."""
    family, row, begin = FAMILIES[name], Row(name, seed), time.process_time()
    torch.manual_seed(seed)
    dense = untrained(family.entry().build()).double().eval()
    example = dict(_wide(family, 2, 12).kwargs)
    options, row.kept = options_of(dense, example)
    l0fast.sparsify_(dense, example_inputs=example, density_init=0.7, skip=False, **options)
    row.gated = _gated_share(dense, example)
    model, small = _pruned(dense, family, even=False)
    row.params = small.report.params[0], small.report.params[1]
    _count(row, model, small.report)
    with float64_for_float32():
        row.error = _error(family, small, model)
        if family.generates:
            torch.manual_seed(seed)
            expected = _written(family, model, cache=True)
            for key, cache in (("cache", True), ("no_cache", False)):
                torch.manual_seed(seed)
                setattr(row, key, torch.equal(_written(family, small, cache), expected))
    _, small = _pruned(dense, family, even=True)
    with tempfile.TemporaryDirectory() as folder:
        _folder(row, family, small.float(), Path(folder))
    row.seconds = time.process_time() - begin
    return row


def main() -> int:
    """Measures the family and seed that the command line names, within its seconds."""
    # Prints of libraries must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.dump_traceback_later(float(sys.argv[3]), exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    answer.write(json.dumps(asdict(measure(sys.argv[1], int(sys.argv[2])))))
    answer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
