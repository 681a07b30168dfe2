"""The pruned model while it is made: the modules of the gated one, and its very weights."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from l0fast.graph.calls import MODULE_ATTRIBUTES, strip_forwards
from l0fast.graph.computed import computed_tensors, copied
from l0fast.graph.sites import replace, tied_modules, without_gates
from l0fast.graph.structure import Structure
from l0fast.graph.tensors import ChannelTensor, channel_tensor
from l0fast.layers.branch import take_branches
from l0fast.layers.expert_hooks import take_experts
from l0fast.layers.handle import gates, handles_in
from l0fast.layers.part import PartGate
from l0fast.layers.sampling import detach
from l0fast.pruning.attributes import AttributePatch
from l0fast.pruning.edits import Edit, edited, in_dtype, sliced
from l0fast.pruning.gate_values import GateValues, all_gates
from l0fast.pruning.scales import scale_, scales_of
from l0fast.pruning.views import Patch
from l0fast.skipping.attach import stop_skipping


class Draft:
    """A copy of a model's modules in which layers are made smaller, undone, and made anew.

    Its weights are the model's own, but for the layers that have gates or get smaller.

    Args:
        model: with gates.
        values: of its gates.
        raw: layers whose weights stay without their gates, since something reads them past the
            layer's own call: the gates are then a factor on the units.
        fake: a mode of fake tensors, for shapes without weights; by default weights are shared.
        names: of the modules before branches were cut out of the model, by their names now.

    Attributes:
        source: the gated model.
        model: the copy, of plain modules.
        factors: names of the layers whose gates are a factor, since no weight can hold them.
        tied: layer -> what it shares a parameter with, in words.
    """

    def __init__(
        self,
        model: nn.Module,
        values: GateValues,
        raw: Collection[str] = (),
        fake: FakeTensorMode | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.values, self.source, self._fake = values, model, fake
        self.names = names or {name: name for name, _ in model.named_modules()}
        self.tied = tied_modules(model)
        # The copy has no handle, and whatever holds a constraint there holds None.
        memo: dict[int, Any] = {}
        for handle in handles_in(model).values():
            memo.update((id(one), None) for one in (handle, *handle.constraints))
        for owned in (model.parameters(), model.buffers()):
            memo.update((id(one), one if fake is None else fake.from_tensor(one)) for one in owned)
        if fake is not None:
            computed = computed_tensors(model)
            memo.update((id(one), fake.from_tensor(one.detach())) for one in computed)
        with without_gates(model) as plain:
            self.model = copied(plain, memo)
        detach(self.model)
        take_branches(self.model)
        take_experts(self.model)
        stop_skipping(self.model)
        strip_forwards(self.model)
        self._gated = [n for n, layer in values.layers.items() if not isinstance(layer, PartGate)]
        self._scales = scales_of(model, values.layers)
        self.factors = {
            name
            for name, layer in values.layers.items()
            if name in self._gated
            and layer.gates != "weight"
            and (name in raw or name in self.tied)
        }
        # Layers whose weights stay without their gates.
        self._unfolded = self.factors | {name for name in values.layers if name in raw}
        self._full = dict(self.model.named_modules())
        self._placed: dict[str, nn.Module] = {}
        self._cut: dict[str, tuple[ChannelTensor, Tensor]] = {}
        """Tensors of modules that got smaller, and what they were."""
        self._before: list[tuple[nn.Module, str, Any]] = []
        """Attributes that were patched, and what they were."""
        self._anew: list[tuple[nn.Module, nn.Module]] = []
        """Modules that were made anew for their views, and those in whose places they are."""
        self._edits: dict[str, Edit | None] = {}
        self._constants: Mapping[str, Tensor] = {}
        self._made: dict[str, tuple[nn.Module, Edit | None, Tensor | None]] = {}
        """Layers that were made last, with the edit and the constants that they were made by."""

    def make_smaller(
        self,
        edits: Iterable[Edit],
        patches: Iterable[Patch] = (),
        constants: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Carries edits out, in place of those before.

        Args:
            edits, patches: to carry out.
            constants: by layer, see `edits.edited`.
        """
        self.undo()
        # Constants change no shape.
        self._constants = constants or {} if self._fake is None else {}
        self._edits = dict.fromkeys([*self._gated, *self._scales])
        self._edits.update((edit.name, edit) for edit in edits)
        for patch in patches:
            module = self.model.get_submodule(patch.name)
            if isinstance(patch, AttributePatch):
                self._before.append((module, patch.held, vars(module).get(patch.held)))
                patch.apply(self.model)
            else:
                patch.apply(self.model)
                self._anew.append((self.model.get_submodule(patch.name), module))
        for name in list(self._edits):
            held = channel_tensor(self.model, name)
            if held is not None:
                self._cut[name] = held, held.tensor
        self.cut_again()
        layers = [name for name in self._edits if name not in self._cut]
        places = {name: self.model.get_submodule(name) for name in layers}
        # Most layers are as in the attempt before; the others go before new ones are made.
        self._made = {name: one for name, one in self._made.items() if self._is_as_made(name)}
        with self.mode():
            for name in layers:
                if name not in self._made:
                    edit = self._edits[name]
                    self._made[name] = self.made(name), edit, self._constants.get(name)
        self._placed = {name: self._made[name][0] for name in layers}
        self._share_again()
        self.model = replace(self.model, {id(places[n]): new for n, new in self._placed.items()})

    def _share_again(self) -> None:
        """Gives an embedding and its head, each of which got smaller, one weight."""
        first: dict[int, nn.Parameter | None] = {}
        for name in self._placed.keys() & self.tied.keys():
            own = self._placed[name]._parameters.get("weight")
            weight = self._full[name]._parameters.get("weight")
            if own is not None and own is not weight:
                self._placed[name]._parameters["weight"] = first.setdefault(id(weight), own)

    def cut_again(self) -> None:
        """Makes the tensors of modules that get smaller anew, of what the whole ones hold now."""
        with self.mode():
            for name, (held, whole) in self._cut.items():
                edit = self._edits[name]
                assert edit is not None
                held.put(sliced(whole.detach(), edit, held.sides))

    def _is_as_made(self, name: str) -> bool:
        """Whether a layer is to be as it was made last."""
        _, edit, before = self._made[name]
        if name not in self._edits or edit != self._edits[name]:
            return False
        now = self._constants.get(name)
        if before is None or now is None:
            return before is now
        return torch.equal(before, now)

    def mode(self) -> AbstractContextManager[object]:
        """What the draft's tensors are computed in."""
        return nullcontext() if self._fake is None else self._fake

    def undo(self) -> None:
        """Puts the layers of full size and the attributes back."""
        back = {id(new): self._full[name] for name, new in self._placed.items()}
        self.model = replace(self.model, back)
        for module, attribute, value in reversed(self._before):
            setattr(module, attribute, value)
        for held, whole in self._cut.values():
            held.put(whole)
        for new, module in reversed(self._anew):
            self.model = replace(self.model, {id(new): module})
        self._placed, self._before, self._anew, self._cut = {}, [], [], {}

    def made(self, name: str, dtype: torch.dtype | None = None) -> nn.Module:
        """One of the layers that have gates or get smaller, made anew.

        Args:
            name: of the layer.
            dtype: of its floating tensors; the model's own by default.
        """
        edit, values = self._edits[name], self.values
        full = self._full[name]
        if name in values.layers and name not in self._unfolded:
            layer = values.layers[name].folded(values.of(name, dtype), dtype)
            plain: Any = in_dtype(full, None)
            plain._parameters.update(layer._parameters)
        else:
            plain = in_dtype(full, dtype)
        for one in [] if values.fully_open else self._scales.get(name, []):
            scale_(plain, values.of(one.gate, dtype), one.place)
        if edit is None:
            return plain
        factor = values.on_units(name, dtype) if name in self.factors else None
        return edited(plain, edit, factor, self._constants.get(name))

    @property
    def makers(self) -> dict[str, Callable[[torch.dtype | None], nn.Module]]:
        """Name of each layer that has been made anew -> how to make it in another dtype."""
        return {name: functools.partial(self.made, name) for name in self._placed}

    def edit(self, name: str) -> Edit | None:
        """How a layer has become smaller, if it has."""
        return self._edits.get(name)

    def finish(self) -> nn.Module:
        """The model, with weights of its own: what it still shares is copied."""
        self.cut_again()
        theirs = {id(one) for one in (*self.source.parameters(), *self.source.buffers())}
        copies: dict[int, Tensor] = {}

        def own(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) not in theirs:
                return value
            if id(value) not in copies:
                plain = value if isinstance(value, nn.Parameter) else value.detach()
                copies[id(value)] = copy.deepcopy(plain)
            return copies[id(value)]

        for module in self.model.modules():
            for owned in (module._parameters, module._buffers):
                owned.update((key, own(value)) for key, value in owned.items())
            for key, value in vars(module).items():  # references beside the registries
                if key not in MODULE_ATTRIBUTES and type(value) in (list, tuple, dict):
                    vars(module)[key] = tree_map(own, value)
        return self.model


def opened(model: nn.Module, raw: Collection[str] = ()) -> nn.Module:
    """The plain model of full size with every gate open, with weights of its own.

    Args:
        model: with gates.
        raw: see `Draft`.
    """
    layers = gates(model).layers
    draft = Draft(model, GateValues(layers, all_gates(layers), fully_open=True), raw)
    draft.make_smaller([])
    return draft.finish()


def new_draft(
    model: nn.Module,
    values: GateValues,
    structure: Structure,
    fake: FakeTensorMode | None = None,
    names: Mapping[str, str] | None = None,
) -> Draft:
    """The draft of a model whose structure is known."""
    tied = tied_modules(model)
    raw = {
        name
        for name in structure.raw(values.layers)
        # Single weights with gates become a copy: other layers go on reading the original.
        if not (name in tied and values.layers[name].gates == "weight")
    }
    draft = Draft(model, values, raw, fake, names)
    for name in raw:
        if structure.trace is not None and not structure.trace.counts[name]:
            draft.factors.discard(name)  # nothing was ever multiplied by its gates
    return draft
