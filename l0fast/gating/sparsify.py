"""Retrofits a model with gates, in place, by replacing its layers with gated ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import nn

from l0fast import _warnings
from l0fast.gating.attention import Unfused, unfuse_
from l0fast.gating.checks import (
    check_call,
    check_parts,
    check_weights,
    check_widths,
    initial_densities,
    refuse_constrained,
    refuse_none,
)
from l0fast.gating.depth import branch_rows, find_branches, put_branches, refuse_no_branches
from l0fast.gating.experts import expert_rows, find_mixtures, put_mixtures, refuse_no_experts
from l0fast.gating.hidden import Hidden, hidden_gates, refuse_hidden
from l0fast.gating.recipes import Choice
from l0fast.gating.selection import (
    UNFOLLOWED,
    ModelT,
    Selection,
    choose,
    computed_row,
    eligible,
    fused_rows,
    gated_inside,
    matcher,
    row_of,
    run_by,
    with_ordinary_attention,
)
from l0fast.gating.table import GateTable
from l0fast.graph.branches import Branch
from l0fast.graph.calls import Example
from l0fast.graph.computed import why_computed
from l0fast.graph.sites import replace, unchanged_if_refused
from l0fast.layers.experts import Mixture
from l0fast.layers.gated_types import gated_type_of
from l0fast.layers.handle import gated_layers, note_adapters
from l0fast.layers.rms_norm import gated_norm
from l0fast.layers.sampling import attach_draw
from l0fast.maths.hard_concrete import HardConcrete
from l0fast.skipping.attach import attach_skipping, stop_skipping


@overload
def sparsify_(
    model: ModelT,
    *,
    gates: str = "auto",
    include: Selection | None = None,
    exclude: Selection | None = None,
    density_init: float | Mapping[str, float] | None = None,
    droprate_init: float | Mapping[str, float] | None = None,
    distribution: HardConcrete | None = None,
    noise: str = "batch",
    depth: bool = False,
    experts: bool = False,
    example_inputs: Any = None,
    skip: str | bool = "auto",
    hidden: bool = False,
    uniform: bool = False,
    dry_run: Literal[False] = False,
) -> ModelT: ...


@overload
def sparsify_(
    model: nn.Module,
    *,
    gates: str = "auto",
    include: Selection | None = None,
    exclude: Selection | None = None,
    density_init: float | Mapping[str, float] | None = None,
    droprate_init: float | Mapping[str, float] | None = None,
    distribution: HardConcrete | None = None,
    noise: str = "batch",
    depth: bool = False,
    experts: bool = False,
    example_inputs: Any = None,
    skip: str | bool = "auto",
    hidden: bool = False,
    uniform: bool = False,
    dry_run: Literal[True],
) -> GateTable: ...


def sparsify_(
    model: nn.Module,
    *,
    gates: str = "auto",
    include: Selection | None = None,
    exclude: Selection | None = None,
    density_init: float | Mapping[str, float] | None = None,
    droprate_init: float | Mapping[str, float] | None = None,
    distribution: HardConcrete | None = None,
    noise: str = "batch",
    depth: bool = False,
    experts: bool = False,
    example_inputs: Any = None,
    skip: str | bool = "auto",
    hidden: bool = False,
    uniform: bool = False,
    dry_run: bool = False,
) -> nn.Module | GateTable:
    """Puts gates on a model's linear and convolution layers, in place, and returns the model.

    Parameters stay the same objects, so an optimizer that was built before still holds them; the
    gates' `log_alpha` are new parameters. In training, one op at the start of the model's forward
    samples the gates of all layers. With density_init=1 the model computes in evaluation what it
    computed before, exactly (to rounding where fused attention is made ordinary).

    With gates="auto" the places of the gates follow from the model's structure, which one
    torch.export on `example_inputs` finds. A convolution without a norm behind it has gates on its
    output channels. Other layers have gates on their inputs, so that what makes an input can go: a
    convolution and its batch norm, an MLP's hidden unit, both halves of a gated MLP. Inputs of the
    model into a Linear have gates, too. Layers that read the same units, or some of them (skip
    connections, dense blocks), share gates. An attention head, a key-value head with its query
    heads, and a group of a convolution have one gate each. The model's output and residual streams
    with norms have none.
    Without an example, or if torch.export refuses the model, each convolution has gates on its
    outputs and each Linear on its inputs.

    Args:
        model: any module. Its nn.Linear, nn.Conv1d/2d/3d and nn.ConvTranspose1d/2d/3d take part;
            subclasses of them that keep their forward, which become layers of the base class; and
            transformers' Conv1D. Layers inside PyTorch's fused attention modules, and layers whose
            weights are computed (weight_norm), do not.
        gates: "auto", or "input", "output" or "weight" for every layer that takes part.
        include: takes only layers whose name matches a glob pattern (or one of several), or for
            which predicate(name, layer) is true.
        exclude: the same, for layers to leave out.
        density_init: the density the gates start with, in (0, 1]: a number, or a dict of name
            pattern -> number (other layers start at 0.9). Default 0.9.
        droprate_init: for replicating papers, see `Gated`; a number or a dict.
        distribution: of the gates; HardConcrete() by default.
        noise: "batch" or "example", see `Gated`.
        depth: whether each residual branch (an attention, an MLP, a ResNet's block) has one more
            gate, y = x + z * f(x). A closed gate removes the branch, and a block without a branch.
        experts: whether each expert of a mixture has one more gate. The router never picks a closed
            expert, and `prune` removes it. As many experts stay as each token needs.
        example_inputs: what the model's forward takes: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments. A list or a NamedTuple is one argument. With it, layers
            that never run on the example have no gates, and closed units can be skipped.
        skip: whether a training step leaves out closed units; the step is the same. "auto": on a
            CPU, where it saves time. True: wherever units can be followed between layers. False:
            nowhere. Needs `example_inputs`. On a GPU, True skips chains of linear layers without
            waiting for the device; with convolutions the host reads the gates once a step.
        hidden: whether the hidden width has gates: one for each channel of a residual stream,
            shared by its RMS norms. What writes into the stream and what reads it gets smaller.
            Needs gates="auto", `example_inputs`, and RMS norms before all that reads the stream (a
            LayerNorm takes the mean of all channels, so no channel can go alone).
        uniform: whether layers that repeat, as in the blocks of a transformer, keep the same number
            of units when the gates settle and in `prune`, as a configuration needs.
        dry_run: changes nothing and returns a table: which layers would have gates, how
            many, on how many units each, and why other layers would have none.

    Raises:
        ValueError: no layer is left to gate, a pattern matches none, an option is out of range,
            the model does not take its example, has a constraint, is sharded or is in DDP.
        TypeError: an option of a wrong type.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (structured gates).

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> model = l0fast.sparsify_(model, example_inputs=torch.randn(2, 8))
    >>> model[2]
    L0Linear(in_features=16, out_features=4, bias=True, gates='input')
    """
    check_call(model, gates, density_init, droprate_init, example_inputs, skip)
    check_parts("depth", depth, gates, noise, example_inputs)
    check_parts("experts", experts, gates, noise, example_inputs)
    check_widths(hidden, uniform, gates, noise, example_inputs)
    example = None if example_inputs is None else Example.of(example_inputs, model)
    calls: dict[str, Unfused] = {}
    twin, fused = model, dict[str, str]()
    if gates == "auto" and example is not None:
        twin, calls, fused = with_ordinary_attention(model, example)
    considered, computed = _considered(twin, include, exclude, example)
    check_weights(considered)
    stream = None if not hidden or example is None else hidden_gates(twin, example)
    if stream is None:
        chosen = choose(twin, gates, considered, example)
    else:
        chosen = choose(stream.model, gates, considered, example, stream.structure)
        considered |= {name: twin.get_submodule(name) for name in stream.choices}
    choices = chosen.choices | ({} if stream is None else dict(stream.choices))
    branches, refused, may = list[Branch](), dict[str, str](), {*considered, *gated_layers(model)}
    mixtures, unmixed = list[Mixture](), dict[str, str]()
    if experts and example is not None:
        mixtures, unmixed = find_mixtures(twin, example, may)
    if depth and example is not None:
        branches, refused = find_branches(twin, chosen.structure, example, may)
    if dry_run:
        rows = [row_of(name, layer, choices[name]) for name, layer in considered.items()]
        rows += [computed_row(name, layer) for name, layer in computed.items()]
        rows += branch_rows(twin, branches, refused) + expert_rows(twin, mixtures, unmixed)
        return GateTable(tuple(rows + fused_rows(twin, fused)), chosen.note)
    if stream is not None and not stream.controls:
        refuse_hidden(model, stream)
    if chosen.structure is not None and chosen.structure.trace is None:
        _warnings.warn(f"sparsify_: {chosen.note}; {UNFOLLOWED}")
    if depth and not branches:
        refuse_no_branches(refused)
    if experts and not mixtures:
        refuse_no_experts(unmixed)
    names = [name for name in considered if choices[name].gates]
    if not names and not branches and not mixtures and not gated_layers(model):
        refuse_none(model, gates, choices, considered, computed)
    refuse_constrained(model, [*names, *(one.name for one in (*branches, *mixtures))])
    initial = initial_densities(names, choices, density_init, droprate_init)

    with unchanged_if_refused(model):
        stop_skipping(model)
        touched = [*names, *(one.name for one in branches)]
        unfuse_(model, {name: call for name, call in calls.items() if gated_inside(name, touched)})
        layers = {name: model.get_submodule(name) for name in names}
        gated = _gated(layers, choices, stream, initial, distribution, noise)
        replace(model, {id(layer): gated[name] for name, layer in layers.items()})
        put_branches(model, branches, density_init, distribution)
        put_mixtures(model, mixtures, density_init, distribution)
        note_adapters(model)
        handle = attach_draw(model)
        handle.uniform |= uniform
        if chosen.structure is not None:
            handle.structure = chosen.structure
        if example is not None:
            attach_skipping(model, example, skip)
    return model


def _gated(
    layers: Mapping[str, nn.Module],
    choices: Mapping[str, Choice],
    stream: Hidden | None,
    initial: Mapping[str, tuple[float | None, float | None]],
    distribution: HardConcrete | None,
    noise: str,
) -> dict[str, Any]:
    """Name -> gated layer, of the same parameters; those that share gates after their first."""
    gated: dict[str, Any] = {}
    for name, layer in layers.items():
        density, droprate = initial[name]
        choice, shared = choices[name], gated.get(choices[name].shared)
        if stream is not None and name in stream.controls:
            controls = stream.controls[name]
            gated[name] = gated_norm(layer, controls, shared, density, droprate, distribution)
            continue
        gated[name] = gated_type_of(layer).from_dense(
            layer,
            gates=choice.gates,
            units=choice.units,
            shared=shared,
            share=choice.share,
            density_init=density,
            droprate_init=droprate,
            distribution=distribution,
            noise=noise,
        )
    return gated


def _considered(
    model: nn.Module,
    include: Selection | None,
    exclude: Selection | None,
    example: Example | None,
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Name -> layer, named by the caller and run by the example: those that may have gates, and
    those that cannot, since something computes their weights."""
    layers = eligible(model)
    names = list(layers)
    barred = {name: why for name, layer in layers.items() if (why := why_computed(layer))}
    if include is not None:
        keep = matcher("include", include, names, barred)
        layers = {name: layer for name, layer in layers.items() if keep(name, layer)}
    if exclude is not None:
        drop = matcher("exclude", exclude, names)
        layers = {name: layer for name, layer in layers.items() if not drop(name, layer)}
    if example is not None:
        reached = run_by(model, layers, example)
        layers = {name: layer for name, layer in layers.items() if id(layer) in reached}
    computed = {name: layer for name, layer in layers.items() if name in barred}
    return {name: layer for name, layer in layers.items() if name not in barred}, computed
