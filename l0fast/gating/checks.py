"""What `sparsify_` refuses, and the densities that its gates start with."""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping
from typing import NoReturn

from torch import nn

from l0fast import _checks
from l0fast.gating.recipes import Choice
from l0fast.gating.selection import per_layer
from l0fast.graph.computed import why_computed
from l0fast.graph.sharding import refuse_shared
from l0fast.layers.dense_types import inner_dims
from l0fast.layers.gated import DENSITY_INIT, Gated
from l0fast.layers.gated_types import gated_type_of
from l0fast.layers.options import GATES
from l0fast.layers.ties import ATTRIBUTE


def check_call(
    model: object,
    gates: object,
    density_init: object,
    droprate_init: object,
    example_inputs: object,
    skip: object,
) -> None:
    """Refuses what is wrong whatever the model is made of."""
    if not isinstance(model, nn.Module):
        _checks.refuse("model", type(model).__name__, "a torch.nn.Module", TypeError)
    if inner_dims(model) is not None and not isinstance(model, Gated):
        wanted = f"a model that contains layers (or {gated_type_of(model).__name__}.from_dense)"
        _checks.refuse("model", f"a single {type(model).__name__}", wanted)
    refuse_shared(model)
    _checks.one_of("gates", gates, ("auto", *GATES))
    _checks.auto_or_bool("skip", skip)
    if skip is True and example_inputs is None:
        _checks.refuse("skip", skip, "'auto' or False without example_inputs")
    if density_init is not None and droprate_init is not None:
        _checks.refuse("droprate_init", droprate_init, "only one of density_init and droprate_init")


def refuse_constrained(model: nn.Module, new: Collection[str]) -> None:
    """Refuses new gates, by the names of their modules, in a model or part of one that has a
    constraint or penalty already: it was built for the gates that were there, and would not count
    them."""
    for name, module in model.named_modules():
        handle = module.__dict__.get(ATTRIBUTE)
        if handle is None or not handle.constraints:
            continue
        gc.collect()  # one that was attached refers to itself, and outlives its deletion
        inside = [one for one in new if not name or one == name or one.startswith(f"{name}.")]
        if inside and handle.constraints:
            kind = type(handle.constraints[0]).__name__
            raise ValueError(
                f"sparsify_: the model has a {kind}, which would not count the new gates of "
                f"{inside[0]!r}. Put all gates in first, then build it; or delete it (after "
                "detach(), if it is attached)"
            )


def check_parts(
    name: str, asked: object, gates: object, noise: object, example_inputs: object
) -> None:
    """Refuses options that gates on parts of a model, branches or experts, do not go with."""
    if not isinstance(asked, bool):
        _checks.refuse(name, asked, "True or False", TypeError)
    if asked and example_inputs is None:
        _checks.refuse(name, asked, "False without example_inputs")
    if asked and gates != "auto":
        _checks.refuse("gates", gates, f"'auto' where {name}=True")
    if asked and noise != "batch":
        _checks.refuse("noise", noise, f"'batch' where {name}=True")


def check_widths(
    hidden: object, uniform: object, gates: str, noise: str, example_inputs: object
) -> None:
    """Refuses gates on the hidden width where the structure is not asked for, or noise differs."""
    for name, value in (("hidden", hidden), ("uniform", uniform)):
        if not isinstance(value, bool):
            _checks.refuse(name, value, "True or False", TypeError)
    if hidden and gates != "auto":
        _checks.refuse("gates", gates, "'auto' with hidden=True")
    if hidden and noise != "batch":
        _checks.refuse("noise", noise, "'batch' with hidden=True (all norms share one draw)")
    if hidden and example_inputs is None:
        _checks.refuse("example_inputs", None, "what the model's forward takes, for hidden=True")


def check_weights(layers: Mapping[str, nn.Module]) -> None:
    """Refuses layers that have no weights."""
    for name, layer in layers.items():
        if not layer.get_parameter("weight").numel():
            _checks.refuse(f"model.{name}", "no weights", "layers with weights; exclude this one")


def refuse_none(
    model: nn.Module,
    gates: str,
    choices: Mapping[str, Choice],
    considered: Mapping[str, nn.Module],
    computed: Mapping[str, nn.Module],
) -> NoReturn:
    """Says why no layer is left to gate."""
    if considered:
        reasons = {name: choices[name].reason for name in considered}
        # What stops the others says more than that a layer reads the model's input.
        told = (name for name, why in reasons.items() if "the model's input" not in why)
        name = next(told, next(iter(reasons)))
        expected = (
            f"a model in which units can be removed ({name!r}: {reasons[name]}); or gates='input', "
            "'output' or 'weight' with include=, for layers that keep their full size around gates"
        )
        _checks.refuse("gates", gates, expected)
    expected = "a model with a Linear or conv layer to gate"
    for name, layer in list(computed.items())[:1]:
        expected += f" ({name!r}: {why_computed(layer)})"
    _checks.refuse("model", type(model).__name__, expected)


def initial_densities(
    names: list[str],
    choices: Mapping[str, Choice],
    density_init: float | Mapping[str, float] | None,
    droprate_init: float | Mapping[str, float] | None,
) -> dict[str, tuple[float | None, float | None]]:
    """Name -> (density_init, droprate_init) of a layer; one for those that share their gates."""
    densities = per_layer("density_init", density_init, names)
    droprates = per_layer("droprate_init", droprate_init, names)
    if isinstance(density_init, Mapping):
        densities = {n: DENSITY_INIT if value is None else value for n, value in densities.items()}
    for name in names:
        owner = choices[name].shared
        for option, of in (("density_init", densities), ("droprate_init", droprates)):
            if owner and of[name] != of[owner]:
                expected = f"one number for {owner!r} and {name!r}, which share their gates"
                _checks.refuse(option, [of[owner], of[name]], expected)
    return {name: (densities[name], droprates[name]) for name in names}
