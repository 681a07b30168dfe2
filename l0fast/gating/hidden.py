"""Gates on the hidden width: one for each channel of a residual stream, in all its RMS norms.

What writes into a stream (embeddings, the last layers of attention and MLP) and what reads it
behind a norm (the first layers, the head) gets smaller with it. A norm of another kind, a layer
that reads the stream without a norm, or a parameter that is added to it, and the stream stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.gating.recipes import Choice
from l0fast.graph.calls import Example
from l0fast.graph.capture import is_carrier, layer_size
from l0fast.graph.sites import Site, find_sites, light_copy, replace, tied_modules
from l0fast.graph.structure import Structure
from l0fast.graph.units import STAYS
from l0fast.graph.walk import Walk
from l0fast.layers.gated import Gated
from l0fast.layers.rms_norm import form_of, gated_norm


@dataclass(frozen=True)
class Hidden:
    """The gates on the residual streams of a model."""

    model: nn.Module
    """A copy of its modules, with gates in the norms, by which the other layers choose theirs."""
    structure: Structure | None
    choices: Mapping[str, Choice]
    """RMS norm -> the gates that it has, or why it has none."""
    controls: Mapping[str, int]
    """Norm with gates -> how many parameters each of them counts for."""


def hidden_gates(model: nn.Module, example: Example) -> Hidden:
    """Finds the residual streams of a model whose channels can go, and puts gates on them.

    Args:
        model: it stays as it is.
        example: of what it takes.

    Raises:
        ValueError: torch.export refuses the model.
    """
    left = _candidates(model)
    refused: dict[str, Choice] = {}
    while left:
        twin = light_copy(model)
        gated: dict[int, nn.Module] = {
            id(twin.get_submodule(name)): _as_gated(twin, name) for name in left
        }
        replace(twin, gated)
        structure = Structure.of(twin, example)
        if structure.trace is None:
            expected = f"False, where torch.export refuses the model ({structure.failure})"
            _checks.refuse("hidden", True, expected)
        sites = find_sites(twin, structure.trace, _tied(twin), {})
        streams = _Streams(Walk(structure.trace, sites.values()), sites, left)
        if not streams.refused:
            return Hidden(twin, structure, refused | streams.choices, streams.controls)
        refused.update(streams.refused)
        left = [name for name in left if name not in streams.refused]
    return Hidden(model, None, refused, {})


def refuse_hidden(model: nn.Module, found: Hidden) -> NoReturn:
    """Says why no residual stream of a model can have gates."""
    norms = [(name, choice.reason) for name, choice in found.choices.items()]
    norms += [
        (name, "a layer norm takes the mean of all channels")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
    ]
    why = f" ({norms[0][0]!r}: {norms[0][1]})" if norms else ""
    expected = (
        f"False for {type(model).__name__}: it has no residual stream that only RMS norms read{why}"
    )
    _checks.refuse("hidden", True, expected)


def _tied(model: nn.Module) -> dict[str, str]:
    found = tied_modules(model).items()
    return {name: f"it shares its weight with {other}" for name, other in found}


def _candidates(model: nn.Module) -> list[str]:
    """The RMS norms as wide as what some layer gives; those of heads mostly are not."""
    modules = dict(model.named_modules())
    widths = {
        getattr(module, key, None)
        for module in modules.values()
        for key in ("embedding_dim", "out_features", "out_channels")
    }
    return [
        name
        for name, module in modules.items()
        if not isinstance(module, Gated)
        and form_of(module) is not None
        and layer_size(module)[0] in widths
    ]


def _as_gated(model: nn.Module, name: str) -> Any:
    return gated_norm(model.get_submodule(name), controls=1)


class _Streams:
    """Which of some norms are those of a stream that can lose channels, and why the others not.

    Args:
        walk: along the graph, with all norms open.
        sites: of the model.
        norms: those in question.
    """

    def __init__(self, walk: Walk, sites: Mapping[str, Site], norms: list[str]) -> None:
        self.walk, self.sites = walk, sites
        self.refused: dict[str, Choice] = {}
        self.choices: dict[str, Choice] = {}
        self.controls: dict[str, int] = {}
        # A norm of something else, such as heads, pins what it reads: judge the others without it.
        for why_not in (self._no_stream, self._why_not):
            reasons = {name: why_not(name) for name in norms}
            self.refused = {name: Choice("", why) for name, why in reasons.items() if why}
            if self.refused:
                return
        vectors = {name: self._classes(name) for name in norms}
        closed = {name: torch.zeros_like(sites[name].writes) for name in norms}
        self._refuse_read(walk.again(closed), vectors)
        for name, vector in vectors.items():
            owner = next(one for one in vectors if bool(torch.isin(vectors[one], vector).any()))
            if not torch.equal(vectors[owner], vector):
                self.refused[name] = Choice("", f"{owner!r} has its channels in another order")
            same = f"the channels of {owner!r}, which reads the same stream"
            shared = "" if owner == name else owner
            self.choices[name] = Choice("output", same if shared else "", shared=shared)
        for name in vectors:
            self.controls[name] = self._controlled(name, vectors)

    def _classes(self, name: str) -> Tensor:
        units = self.walk.inputs[name]
        assert units is not None
        return self.walk.classes[units.labels]

    def _no_stream(self, name: str) -> str:
        """Why a norm is none of a stream, as far as the norm itself goes; "" if it may be one."""
        site, calls = self.sites[name], self.walk.trace.counts[name]
        if site.fixed or calls != 1:
            return site.fixed or f"it is called {calls} times"
        return "" if self.walk.inputs[name] is not None else "it is no norm of a residual stream"

    def _why_not(self, name: str) -> str:
        """Why the channels of a norm cannot go one by one; "" if they can."""
        walk, units = self.walk, self.walk.inputs[name]
        assert units is not None
        classes = self._classes(name)
        if bool((classes == walk.classes[STAYS]).any()):
            return f"what it reads must stay: {walk.reasons(units.labels)}"
        if len(classes.unique()) < len(classes):
            return f"the channels that it reads can only go together: {walk.tied_by(units.labels)}"
        return ""

    def _refuse_read(self, shut: Walk, vectors: Mapping[str, Tensor]) -> None:
        """Refuses the streams that something reads past their norms."""
        for name, units in shut.inputs.items():
            if units is None or is_carrier(self.sites[name].layer):
                continue
            live = shut.classes[units.labels[(units.constant != 0) | shut.tainted[units.labels]]]
            for norm, vector in vectors.items():
                if bool(torch.isin(vector, live).any()):
                    reason = f"{name!r} reads the same stream without a norm"
                    self.refused.setdefault(norm, Choice("", reason))

    def _controlled(self, norm: str, vectors: Mapping[str, Tensor]) -> int:
        """What a gate of a norm counts for: the parameters of a channel, in equal parts for the
        norms of its stream."""
        vector, weights = vectors[norm], dict[int, int]()
        for name, site in self.sites.items():
            units, weight = self.walk.inputs.get(name), site.layer._parameters.get("weight")
            made = self.walk.classes[self.walk.outputs.get(name, torch.zeros(1).long())]
            read = vector[:0] if units is None else self.walk.classes[units.labels]
            if weight is None or is_carrier(site.layer):
                continue
            inputs, outputs = layer_size(site.layer)
            if bool(torch.isin(read, vector).any()):
                weights[id(weight)] = weight.numel() // inputs
            elif bool(torch.isin(made, vector).any()):
                biases = site.layer._parameters.get("bias") is not None
                weights[id(weight)] = weight.numel() // outputs + biases
        number = sum(torch.equal(other, vector) for other in vectors.values())
        return 1 + sum(weights.values()) // number
