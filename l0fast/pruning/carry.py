"""What a training holds beside its model, made as small as the pruned model, to train on."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from l0fast import _checks
from l0fast.graph.calls import unwrapped
from l0fast.graph.capture import is_rms_norm
from l0fast.graph.computed import copied
from l0fast.graph.cuts import Cut
from l0fast.graph.fewer import Fewer, expert_tensors
from l0fast.graph.tensors import part_of
from l0fast.layers.handle import gated_layers, gates
from l0fast.layers.rms_norm import weight_left
from l0fast.pruning.draft import Draft
from l0fast.pruning.edits import Edit, sliced, weight_sides
from l0fast.pruning.gate_values import GateValues, all_gates
from l0fast.pruning.report import recipe_of, report_of

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


class _Origin(NamedTuple):
    """Where a tensor of the pruned model comes from."""

    name: str
    edit: Edit | None
    sides: tuple[str, ...]
    """Of its layer, see `weight_sides`."""
    fewer: Fewer | None = None
    """The mixture that lost experts, of which the tensor has a part for each."""

    def part(self, value: Tensor) -> Tensor:
        """What the pruned model has of it; a copy."""
        if self.fewer is not None:
            value = self.fewer.part(value)
        if self.edit is None:
            return value.detach().clone()
        return sliced(value.detach(), self.edit, self.sides)

    def weight(self, layer: nn.Module, value: Tensor) -> Tensor:
        """The same of a parameter of its layer, as the pruned model computes with it."""
        if self.edit is None or self.edit.outputs is None or not is_rms_norm(layer):
            return self.part(value)
        return weight_left(layer, value.detach(), torch.tensor(self.edit.outputs))


def _edits(model: nn.Module, small: nn.Module) -> dict[str, Edit]:
    """Name of a layer -> the edit that `prune` made of it."""
    before, report = recipe_of(model).layers, report_of(small)
    if report is None or report.layers[: len(before)] != before:
        _checks.refuse("small", type(small).__name__, "the model that prune made of `model`")
    edits = [Edit.from_json(entry) for entry in report.layers[len(before) :]]
    return {edit.name: edit for edit in edits}


def _cut(model: nn.Module, small: nn.Module) -> Cut:
    """The cut that `prune` made."""
    before, report = recipe_of(model).cuts, report_of(small)
    made = [] if report is None else report.cuts[len(before) :]
    return Cut.from_json(made[0]) if made else Cut()


def _origins(model: nn.Module, small: nn.Module) -> dict[str, _Origin]:
    """Name of a tensor in the pruned model's state -> what it is of the model's, where it is.

    Raises:
        ValueError: `small` was not pruned from `model`.
    """
    edits, cut = _edits(model, small), _cut(model, small)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    origins: dict[str, _Origin] = {}
    fewer = {place: one for one in cut.experts for place in expert_tensors(model, one.mixture)}
    for name, tensor in small.state_dict().items():
        holder, _, key = name.rpartition(".")
        outer = holder.removesuffix("layer").removesuffix(".")
        inside = holder not in edits and outer in edits and holder != outer
        layer = outer if inside else holder
        edited = name if name in edits else layer  # a tensor, or the layer that has it
        old = cut.old(layer)
        sides = weight_sides(part_of(model, cut.old(edited))) if edited in edits else ()
        lost = fewer.get((old, key))
        origin = _Origin(f"{old}.{key}" if layer else key, edits.get(edited), sides, lost)
        if origin.name in shapes:
            meta = origin.part(torch.empty(shapes[origin.name], device="meta"))
            if meta.shape == tensor.shape:
                origins[name] = origin
                continue
        beside = holder.rpartition(".")  # a gather, a scatter or a scale, which the edit added
        if not (beside[0] in edits and beside[2] in ("gather", "scatter", "scale")):
            _checks.refuse("small", type(small).__name__, "the model that prune made of `model`")
    return origins


def prune_optimizer(optimizer: OptimizerT, model: nn.Module, small: nn.Module) -> OptimizerT:
    """An optimizer for a pruned model that continues the optimizer of the gated model.

    It has the same class, options and parameter groups, in the same order, with the pruned model's
    parameters. Each parameter keeps its step count, and of its state (momentum, Adam's moments)
    the part for the units that are left. The state of gates is dropped, so a group of gates is
    empty. The optimizer passed in is not changed. Build a learning rate scheduler anew around the
    result.

    If all gates that are left are fully open, the next step is exactly that of the gated model
    without noise. A gate between 0 and 1 has become part of the weights; their moments are still
    those from before.

    Args:
        optimizer: any optimizer whose state for each parameter is numbers, and tensors of the
            parameter's shape.
        model: the gated model, as it was pruned.
        small: what `prune` made of it.

    Raises:
        ValueError: `small` was not pruned from `model`, a parameter is not the model's, or a
            state has another shape.
        TypeError: not an optimizer.

    >>> x = torch.randn(2, 8)
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model = l0fast.sparsify_(model, example_inputs=x)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> small = l0fast.prune(model, x, 0.5, measure="params")
    >>> optimizer = l0fast.prune_optimizer(optimizer, model, small)
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        expected = "a torch.optim.Optimizer"
        _checks.refuse("optimizer", type(optimizer).__name__, expected, TypeError)
    model = unwrapped(model)
    origins = {origin.name: (name, origin) for name, origin in _origins(model, small).items()}
    named = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    gates = {id(layer.log_alpha) for layer in gated_layers(model).values()}
    cut = _cut(model, small)
    after = dict(small.named_parameters(remove_duplicate=False))
    kind = type(optimizer).__name__
    groups: list[dict[str, Any]] = []
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    for group in optimizer.param_groups:
        parameters: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) in gates:
                continue
            if id(parameter) not in named:
                shape = tuple(parameter.shape)
                _checks.refuse("optimizer", f"a parameter of shape {shape}", "the model's own")
            if named[id(parameter)] not in origins and (cut.branches or cut.experts):
                continue  # of a branch or an expert that is gone
            name, origin = origins[named[id(parameter)]]
            parameters.append(after[name])
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value = origin.part(value)
                elif isinstance(value, Tensor) and value.numel() == 1:
                    value = value.clone()
                elif value is not None and not isinstance(value, (int, float)):
                    expected = f"numbers and tensors of the parameter's shape in its state ({key})"
                    _checks.refuse("optimizer", kind, expected)
                state[after[name]][key] = value
        options = {key: value for key, value in group.items() if key != "params"}
        groups.append({"params": parameters, **options})
    twin = copy.copy(optimizer)  # by its own getstate, which leaves hooks and schedulers behind
    twin.defaults = dict(optimizer.defaults)
    twin.param_groups, twin.state = groups, state
    return twin


def _carried(origin: _Origin, model: nn.Module, state: Mapping[str, Tensor]) -> Tensor:
    layer = model.get_submodule(origin.name.rpartition(".")[0])
    return origin.weight(layer, state[origin.name])


def prune_state_dict(
    state_dict: Mapping[str, Tensor], model: nn.Module, small: nn.Module
) -> dict[str, Tensor]:
    """Makes a state of the gated model, such as an average of its weights, one of the pruned model.

    Equals:
        small.state_dict(), if `state_dict` is the model's own

    Args:
        state_dict: of the gated model, or of the dense one (the gates are then the model's).
        model: the gated model, as it was pruned.
        small: what `prune` made of it.

    Raises:
        ValueError: `small` was not pruned from `model`, the state does not fit the model, or some
            biases of `small` hold constants that `prune` computed from the model's own state.
    """
    model = unwrapped(model)
    report = report_of(small)
    folded = [] if report is None else report.folded
    if folded:
        expected = (
            "a model whose biases hold no constants. Load the state into a copy of the gated model "
            "and prune that"
        )
        _checks.refuse("small", f"a model with constants in the bias of {folded[0]!r}", expected)
    origins = _origins(model, small)
    twin = copied(model)
    kept = {name: one for name, one in twin.state_dict().items() if name.endswith(".log_alpha")}
    try:
        twin.load_state_dict({**kept, **state_dict})  # a dense one has no gates
    except RuntimeError as error:
        expected = f"a state of the model ({' '.join(str(error).split())[:200]})"
        _checks.refuse("state_dict", f"{len(state_dict)} tensors", expected)
    cut = _cut(model, small)
    scaled = [cut.old(name) for name, e in _edits(model, small).items() if e.scale is not None]
    layers = gates(twin).layers
    draft = Draft(twin, GateValues(layers, all_gates(layers)), scaled)
    draft.make_smaller([])
    whole = draft.model.state_dict()
    return {
        name: _carried(origins[name], twin, whole) if name in origins else own.clone()
        for name, own in small.state_dict().items()
    }
