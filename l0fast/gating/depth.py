"""Gates on whole residual branches: what `sparsify_` does with depth=True."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

from torch import Tensor, nn

from l0fast import _checks
from l0fast.gating.table import GateRow
from l0fast.graph.branches import Branch, Branches, parameters_of, without
from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.capture import LAYERS
from l0fast.graph.compare import Precision, relative_error, values_of
from l0fast.graph.cuts import cut_, plan_cut
from l0fast.graph.sites import light_copy, without_gates
from l0fast.graph.standins import calls_of
from l0fast.graph.structure import Structure
from l0fast.layers.branch import CHILD, BranchGate, has_branch, put_branch
from l0fast.layers.dense_types import kind_of
from l0fast.layers.gated import DENSITY_INIT
from l0fast.maths.hard_concrete import HardConcrete

SEED = 0


def _silenced(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 0


@contextmanager
def _silent(model: nn.Module, names: Iterable[str]) -> Generator[None]:
    """Some layers give zeros."""
    hooks = [model.get_submodule(name).register_forward_hook(_silenced) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _holds(plain: nn.Module, branches: list[Branch], example: Example) -> bool:
    """Whether a model without some branches gives what it gives where their hosts give zeros."""
    try:
        silent = _silent(plain, [one.name for one in branches])
        with own_randomness(plain, SEED), silent, Precision() as precision:
            expected = values_of(example.copy().call(plain))
        cut = cut_(light_copy(plain), plan_cut(plain, branches, drop=False))
        with own_randomness(plain, SEED):
            got = values_of(example.copy().call(cut))
        return relative_error(got, expected) <= precision.tolerance
    except Exception:  # something reads an attribute of a module that is gone
        return False


def find_branches(
    model: nn.Module, structure: Structure | None, example: Example, layers: Collection[str]
) -> tuple[list[Branch], dict[str, str]]:
    """The branches of a model that can have gates; and why others cannot, by host.

    Each is tried out: without it the model gives what it gives where the branch adds zeros.

    Args:
        model: with or without gates.
        structure: of it.
        example: of what it takes.
        layers: those that may have gates; a branch takes part with all its layers, or not at all.
    """
    if structure is None or structure.trace is None:
        failure = "its structure is not known" if structure is None else structure.failure
        expected = f"False for this model: torch.export refuses it ({failure})"
        _checks.refuse("depth", True, expected)
    with evaluating(model), without_gates(model) as plain:
        made = Branches(plain, structure.trace, calls_of(plain, example))
        refused = dict(made.refused)
        found: list[Branch] = []
        for one in made.found:
            if has_branch(model.get_submodule(one.name)):
                continue
            inside = [name for name in structure.trace.calls_of() if one.holds(name)]
            if any(kind_of(plain.get_submodule(n)) in LAYERS and n not in layers for n in inside):
                refused[one.name] = "not all of its layers may have gates"
            else:
                found.append(one)
        # All of them, and halves: a branch that stays may read what one that is gone gave it.
        several = [some for some in (found, found[::2], found[1::2]) if some]
        if not all(_holds(plain, some, example) for some in several):
            tried = ([one, made.needed(one)] for one in found)
            held = [next((o for o in two if _holds(plain, [o], example)), None) for two in tried]
            for one, other in zip(found, held, strict=True):
                if other is None:
                    refused[one.name] = "without it the model fails, or computes something else"
            found = [one for one in held if one is not None]
            if found and not _holds(plain, found, example):
                refused.update((one.name, "it cannot go when others have gone") for one in found)
                found = []
    kept = {one.name for one in found}
    lost = {one.name for one in made.found} - kept
    return [without(one, lost) for one in found], refused


def put_branches(
    model: nn.Module,
    branches: Iterable[Branch],
    density_init: float | Mapping[str, float] | None,
    distribution: HardConcrete | None,
) -> None:
    """Puts gates on branches, in place."""
    density = (
        DENSITY_INIT if density_init is None or isinstance(density_init, Mapping) else density_init
    )
    for one in branches:
        host = model.get_submodule(one.name)
        weight: Any = host._parameters["weight"]
        put_branch(host, BranchGate(one, weight, parameters_of(model, one), density, distribution))


def branch_rows(
    model: nn.Module, branches: Iterable[Branch], refused: Mapping[str, str]
) -> list[GateRow]:
    """What the table says of branches."""
    rows = [
        GateRow(
            f"{one.name}.{CHILD}",
            "Branch",
            "branch",
            parameters_of(model, one),
            1,
            f"the branch of {', '.join(stand.name for stand in one.modules)}",
        )
        for one in branches
    ]
    return rows + [GateRow(name, "Branch", "", 1, 0, why) for name, why in refused.items()]


def refuse_no_branches(refused: Mapping[str, str]) -> NoReturn:
    """Says why a model has no branch to gate."""
    why = next((f" ({name!r}: {reason})" for name, reason in refused.items()), "")
    _checks.refuse("depth", True, f"False for this model: no residual branch can be removed{why}")
