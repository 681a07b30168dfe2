"""Gates on the experts of mixtures: what `sparsify_` does with experts=True."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from l0fast import _checks
from l0fast.gating.table import GateRow
from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.capture import LAYERS
from l0fast.graph.compare import Precision, relative_error, values_of
from l0fast.graph.cuts import Cut, cut_
from l0fast.graph.fewer import Fewer, parameters_of
from l0fast.graph.mixtures import mixtures_of
from l0fast.graph.sites import light_copy, without_gates
from l0fast.layers.dense_types import kind_of
from l0fast.layers.expert_hooks import put_experts
from l0fast.layers.experts import CHILD, ExpertGate, Mixture
from l0fast.layers.gated import DENSITY_INIT
from l0fast.layers.handle import gated_layers
from l0fast.maths.hard_concrete import HardConcrete

SEED = 0
TOGETHER = "their units have no gates, since one tensor has the weights of all experts"


def _some(mixture: Mixture) -> tuple[int, ...]:
    """The experts that stay in the trial."""
    chance = torch.Generator().manual_seed(SEED)
    order = torch.randperm(mixture.number, generator=chance).tolist()
    return tuple(sorted(order[: max(mixture.least, (mixture.number + 1) // 2)]))


def _closed(plain: nn.Module, mixtures: Iterable[Mixture]) -> nn.Module:
    """A copy with gates, of which those that do not stay are closed."""
    twin = light_copy(plain)
    for one in mixtures:
        like = next(twin.get_submodule(one.path(one.router)).parameters())
        gate = ExpertGate(one, like, 1, 1.0)
        with torch.no_grad():
            gate.log_alpha.fill_(-torch.inf)[list(_some(one))] = torch.inf
        put_experts(twin, gate.eval())
    return twin.eval()


def _holds(plain: nn.Module, mixtures: list[Mixture], example: Example) -> bool:
    """Whether a model without some experts gives what it gives where no token gets to them."""
    given: list[Any] = []
    try:
        cut = Cut(experts=tuple(Fewer(one, _some(one), False) for one in mixtures))
        for model in (_closed(plain, mixtures), cut_(light_copy(plain), cut)):
            with own_randomness(model, SEED), torch.no_grad(), Precision() as precision:
                given.append(values_of(example.copy().call(model)))
        finite = all(bool(torch.isfinite(one).all()) for one in given[0])
        return finite and relative_error(given[1], given[0]) <= precision.tolerance
    except Exception:  # it goes by sizes that no attribute says
        return False


def find_mixtures(
    model: nn.Module, example: Example, layers: Collection[str]
) -> tuple[list[Mixture], dict[str, str]]:
    """The mixtures of a model whose experts can have gates; and why others cannot, by the name of
    their experts.

    Args:
        model: with or without gates.
        example: of what it takes.
        layers: those that may have gates; experts that are modules take part with all their layers.
    """
    had = gated_layers(model)
    with evaluating(model), without_gates(model) as plain:
        made, refused = mixtures_of(plain, example)
        found: list[Mixture] = []
        for one in made:
            name = one.path(one.experts)
            if ".".join(part for part in (one.name, CHILD) if part) in had:
                continue
            inside = (n for n, m in plain.named_modules() if kind_of(m) in LAYERS)
            if one.is_list and any(n.startswith(f"{name}.") and n not in layers for n in inside):
                refused[name] = "not all of its layers may have gates"
            elif one.number <= one.least:
                refused[name] = f"each token needs {one.least} of its {one.number} experts"
            else:
                found.append(one)
        held = found
        if found and not _holds(plain, found, example):
            held = [one for one in found if _holds(plain, [one], example)]
            for one in (one for one in found if one not in held):
                why = "without some of them the model does not run, or computes something else"
                refused[one.path(one.experts)] = why
    return held, refused


def put_mixtures(
    model: nn.Module,
    mixtures: Iterable[Mixture],
    density_init: float | Mapping[str, float] | None,
    distribution: HardConcrete | None,
) -> None:
    """Puts gates on experts, in place."""
    density = (
        DENSITY_INIT if density_init is None or isinstance(density_init, Mapping) else density_init
    )
    for one in mixtures:
        router = model.get_submodule(one.path(one.router))
        weight: Any = router._parameters["weight"]
        gate = ExpertGate(one, weight, parameters_of(model, one), density, distribution)
        put_experts(model, gate)


def expert_rows(
    model: nn.Module, mixtures: Iterable[Mixture], refused: Mapping[str, str]
) -> list[GateRow]:
    """What the table says of mixtures."""
    rows = [
        GateRow(
            one.path(CHILD),
            "Experts",
            "expert",
            parameters_of(model, one),
            one.number,
            f"{one.path(one.router)!r} picks among them; each token needs {one.least}"
            + ("" if one.is_list else f"; {TOGETHER}"),
        )
        for one in mixtures
    ]
    return rows + [GateRow(name, "Experts", "", 1, 0, why) for name, why in refused.items()]


def refuse_no_experts(refused: Mapping[str, str]) -> NoReturn:
    """Says why a model has no experts to gate."""
    why = next((f" ({name!r}: {reason})" for name, reason in refused.items()), "")
    expected = f"False for this model: it has no mixture of experts whose router is found{why}"
    _checks.refuse("experts", True, expected)
