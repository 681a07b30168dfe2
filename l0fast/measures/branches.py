"""What a model has in its residual branches and experts beside layers and products that are
reckoned by their units: norms, tables, layers that cannot get smaller. It goes with the branch,
with its block, or with the expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from l0fast.graph.branches import Branch
from l0fast.graph.dependencies import GateDependencies
from l0fast.measures.groups import Group


class Part(NamedTuple):
    """A branch, a block of branches, or an expert."""

    modules: list[str]
    """What goes with it."""
    all_of: list[int]
    """Numbers of gates: it is there while all of these are open,"""
    any_of: list[int]
    """and one of these."""
    inside: int
    """Place of the innermost other part that it is in; -1 where it is in none."""


def _inside(name: str, modules: list[str]) -> bool:
    return any(f"{name}.".startswith(f"{one}.") for one in modules)


def parts_of(needs: GateDependencies) -> list[Part]:
    """The branches of a model, the blocks that go with them, and the experts."""
    found: list[tuple[list[str], list[int], list[int]]] = []
    gates = {branch.name: gate for gate, branch in needs.branches}
    blocks: dict[str, Branch] = {}
    for gate, branch in needs.branches:
        host = [other for other in needs.around(branch.name) if other != gate]
        names = [stand.name for stand in branch.modules]
        block = [] if branch.block is None else [branch.block.name]
        # A norm before the block may be of the branch, too.
        halves = [[n for n in names if _inside(n, block) == within] for within in (False, True)]
        found += [(half, [*host, gate], []) for half in halves if half]
        if branch.block is not None:
            blocks[branch.block.name] = branch
    for name, branch in blocks.items():
        found.append(([name], needs.around(name), [gates[one] for one in branch.members]))
    for own, mixture in needs.experts:
        around = needs.around(mixture.name)
        for place, gate in enumerate(own.tolist()):
            names = [share_of(name, place) for name in needs.experts.shared(mixture)]
            names += [mixture.expert(place)] if needs.experts.goes(mixture) else []
            found += [([name], [*around, gate], []) for name in names]
    inside: list[int] = []
    for place, (modules, _, _) in enumerate(found):
        outer = [
            other
            for other, (around, _, _) in enumerate(found)
            if other != place and all(_inside(name, around) for name in modules)
        ]
        # Of those around it the innermost is the one that is in all others.
        inside.append(max(outer, key=lambda one: _number_around(found, one), default=-1))
    return [Part(*one, within) for one, within in zip(found, inside, strict=True)]


def _number_around(found: list[tuple[list[str], list[int], list[int]]], place: int) -> int:
    modules = found[place][0]
    return sum(all(_inside(name, around) for name in modules) for around, _, _ in found)


def share_of(name: str, place: int) -> str:
    """What stands for the part that a module has for one expert, among the names of modules."""
    return f"{name}.expert {place}"


def _amount(cost: dict[str, float], group: Group, name: str) -> float:
    """What a module has of a group that is a whole module."""
    whole = group.whole
    if whole is None:
        return 0.0
    if not whole or f"{name}.".startswith(f"{whole}."):
        return float(cost[name])
    return float(cost[whole]) if whole.startswith(f"{name}.") else 0.0


def beside_units(
    parts: list[Part],
    cost: dict[str, float],
    groups: list[Group],
    reckoned: list[tuple[str, Tensor]],
) -> Tensor:
    """[C, P] what each part has beside what is reckoned by its units, and beside parts inside it.

    Args:
        parts: see `parts_of`.
        cost: of each module of the dense model, and of each `share_of`.
        groups: whose costs these are.
        reckoned: (module, [C] what of it is reckoned by its units).
    """
    total = torch.tensor(
        [[sum(_amount(cost, g, n) for n in part.modules) for part in parts] for g in groups],
        dtype=torch.float64,
    ).view(len(groups), -1)
    left = total.clone()
    for place, part in enumerate(parts):
        if part.inside >= 0:
            left[:, part.inside] -= total[:, place]
    whole = torch.tensor([group.whole is not None for group in groups])
    for name, amount in reckoned:
        around = [place for place, part in enumerate(parts) if _inside(name, part.modules)]
        if around:
            innermost = max(around, key=lambda place: len(_outer(parts, place)))
            left[:, innermost] -= amount * whole
    return left


def _outer(parts: list[Part], place: int) -> list[int]:
    """The parts around one."""
    found: list[int] = []
    while parts[place].inside >= 0:
        place = parts[place].inside
        found.append(place)
    return found


def gates_of(parts: list[Part], always: int, never: int) -> tuple[Tensor, Tensor]:
    """([P, A], [P, B]) the gates of which each part needs all, and one, by number."""

    def padded(rows: list[list[int]], filler: int) -> Tensor:
        rows = [row or [always] for row in rows]
        width = max(map(len, rows), default=1)
        filled = [row + [filler] * (width - len(row)) for row in rows]
        return torch.tensor(filled, dtype=torch.int64).view(-1, width)

    all_of, any_of = [part.all_of for part in parts], [part.any_of for part in parts]
    return padded(all_of, always), padded(any_of, never)
