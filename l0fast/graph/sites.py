"""The layers of a model that may get smaller, and why others must not."""

from __future__ import annotations

import copy
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from l0fast.graph.capture import Trace, is_carrier, layer_size, sites_in
from l0fast.graph.computed import copied
from l0fast.graph.tensors import ChannelTensor, channel_tensor
from l0fast.layers.dense_types import TRANSPOSED, kind_of
from l0fast.layers.draw import Drawn
from l0fast.layers.handle import gated_layers
from l0fast.layers.hooks import foreign_hooks
from l0fast.layers.rms_norm import GatedRMSNorm

NOT_RUN = "it does not run in evaluation"
"""Why a layer stays that the example does not reach."""
UNREAD = "an output that nobody reads"
"""Why the units of some layers stay."""


@dataclass(frozen=True)
class Site:
    """A layer that may get smaller, as its own gates and the rest of the model leave it."""

    name: str
    layer: nn.Module
    """Gated or plain; its weights may change, its sizes do not."""
    reads: Tensor
    """bool [in]: inputs that its gates leave open."""
    writes: Tensor
    """bool [out]: outputs that its gates leave open."""
    fixed: str = ""
    """Why its full inputs and outputs must stay where they are, if they must."""
    local: bool = True
    """Whether it may nevertheless compute less inside, with a gather and a scatter around."""
    folds: bool = False
    """Whether an input that is constant can be made part of its bias."""
    gate: Tensor | None = None
    """[out] the gates on its outputs, which multiply its bias."""
    bound: bool = False
    """Whether its weight is another layer's too, whose units go with its own: the outputs of an
    embedding are the inputs of a head."""

    @property
    def kind(self) -> str:
        """The name of its (dense) class."""
        return kind_of(self.layer).__name__

    def bias(self) -> Tensor:
        """float64 [out], or 0-d: the bias with its gates."""
        bias = self.layer._parameters.get("bias")
        if bias is None:
            return torch.zeros((), dtype=torch.float64)
        found = bias.detach().cpu().double()
        return found if self.gate is None else found * self.gate.cpu().double()


def is_held(site: Site) -> bool:
    """Whether a site is no layer, but a tensor that another module holds."""
    return isinstance(site.layer, ChannelTensor)


def light_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules may be replaced: it has the same parameters, not copies of them."""
    return copied(model, {id(parameter): parameter for parameter in model.parameters()})


@contextmanager
def without_gates(model: nn.Module, exported: bool = False) -> Generator[nn.Module]:
    """The model with ordinary layers for its gated ones, of the very parameters; after it, the
    gated ones are back.

    Args:
        model: with gates.
        exported: each gated norm is one op, whatever its code, see `StandIn`.
    """
    layers = list(gated_layers(model).values())
    plain = [
        layer.stand_in() if exported and isinstance(layer, GatedRMSNorm) else layer.dense()
        for layer in layers
    ]
    try:
        yield replace(model, {id(layer): one for layer, one in zip(layers, plain, strict=True)})
    finally:
        replace(model, {id(one): layer for layer, one in zip(layers, plain, strict=True)})


def replace(model: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Puts modules into the places of others (by id), in place; returns the root."""
    for module in [*model.modules(), *replacements.values()]:
        for name, child in list(module._modules.items()):
            if id(child) in replacements:
                module._modules[name] = replacements[id(child)]
    return replacements.get(id(model), model)


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Generator[None]:
    """Puts a model's modules, hooks and attributes back where an error ends the block."""
    before = {
        module: {
            key: (value, copy.copy(value) if isinstance(value, (dict, set)) else None)
            for key, value in vars(module).items()
        }
        for module in model.modules()
    }
    try:
        yield
    except BaseException:
        for module, attributes in before.items():
            vars(module).clear()
            for key, (value, content) in attributes.items():
                if content is not None:  # the same object: handles of hooks point to it
                    value.clear()
                    value.update(content)
                vars(module)[key] = value
        raise


def tied_modules(model: nn.Module) -> dict[str, str]:
    """Module -> what it shares a parameter with; gates do not count."""
    gates = {id(layer.log_alpha) for layer in gated_layers(model).values()}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in gates:
                continue
            if name not in owners.setdefault(id(parameter), []):
                owners[id(parameter)].append(name)
    tied: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            others = [other for other in owners.get(id(parameter), []) if other != name]
            if others:
                tied[name] = " and ".join(repr(other) for other in others)
    return tied


def is_bound(layer: nn.Module, sites: Collection[nn.Module]) -> bool:
    """Whether a layer is an embedding with one weight for itself and a head, or that head, and the
    embedding is one of the sites."""
    weight = layer._parameters.get("weight")
    sharing = [one for one in sites if one._parameters.get("weight") is weight]
    embeddings = [one for one in sharing if isinstance(one, nn.Embedding)]
    heads = [one for one in sharing if kind_of(one) is nn.Linear and not isinstance(one, Drawn)]
    return len(embeddings) > 0 and len(embeddings) + len(heads) == len(sharing) > 1


def _has_bias_for_all(layer: nn.Module) -> bool:
    """Whether a constant input adds the same everywhere, to a bias: it is not padded with zeros.

    A transposed convolution gives less at its borders, or between its strides.
    """
    if isinstance(layer, TRANSPOSED):
        return False
    padding: Any = getattr(layer, "padding", "valid")
    same = not any(padding) if isinstance(padding, tuple) else padding == "valid"
    return same and layer._parameters.get("bias") is not None


def find_sites(
    model: nn.Module, trace: Trace | None, tied: Mapping[str, str], full: Mapping[str, str]
) -> dict[str, Site]:
    """Every layer of a model that can be made smaller, all of it open.

    Args:
        model: with or without gates, which do not matter here.
        trace: its export, if there is one.
        tied: layer -> what it shares its weight with, in words.
        full: layers that must not get smaller -> why.
    """
    sites: dict[str, Site] = {}
    found = sites_in(model)
    for name, layer in found.items():
        inputs, outputs = layer_size(layer)
        local, bound = False, name in tied and is_bound(layer, found.values())
        if name in full:
            fixed = full[name]
        elif name in tied and not bound:
            fixed = tied[name]
        elif trace is not None and name in trace.read_outside:
            fixed = "its weight is also read outside of its own call"
        elif foreign_hooks(layer):
            fixed = "it has hooks"
        else:
            local = not bound and (not is_carrier(layer) or isinstance(layer, GatedRMSNorm))
            fixed = "" if trace is None or trace.counts[name] else NOT_RUN
        reads, writes = (torch.ones(size, dtype=torch.bool) for size in (inputs, outputs))
        folds = not fixed and not is_carrier(layer) and _has_bias_for_all(layer)
        sites[name] = Site(name, layer, reads, writes, fixed, local, folds, bound=bound)
    for name in () if trace is None else trace.held.values():
        held = channel_tensor(model, name)
        if held is not None:
            reads, writes = (torch.ones(n, dtype=torch.bool) for n in layer_size(held))
            sites[name] = Site(name, held, reads, writes, full.get(name, ""), local=False)
    return sites
