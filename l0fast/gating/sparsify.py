"""Retrofits a model with gates, in place, by replacing its layers with gated ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import nn

from l0fast.gating.attention import Unfused, unfuse_
from l0fast.gating.checks import (
    check_call,
    check_parts,
    check_weights,
    check_widths,
    initial_densities,
    refuse_none,
)
from l0fast.gating.depth import (
    branch_rows,
    find_branches,
    put_branches,
    refuse_no_branches,
)
from l0fast.gating.experts import (
    expert_rows,
    find_mixtures,
    put_mixtures,
    refuse_no_experts,
)
from l0fast.gating.hidden import Hidden, hidden_gates, refuse_hidden
from l0fast.gating.recipes import Choice, GateTable
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

    The parameters stay the same objects, so an optimizer built before still holds them; the
    gates' `log_alpha` come on top. In training the gates of all layers are sampled by one op at
    the start of the model's forward. With density_init=1 the model computes in evaluation
    exactly what it computed before (fused attention that is made ordinary: but for rounding).

    With gates="auto" the model's structure says where they go, found by one torch.export on
    `example_inputs`: on the output channels of convolutions without a norm behind them; elsewhere
    on the inputs of a Linear or a convolution, so that what makes these can go (a convolution and
    its batch norm, an MLP's hidden units, both halves of a gated MLP). Layers that read the same
    units, or a part of the same (a skip connection, a dense block), share the gates of these. There
    is one gate for each attention head, group of query heads with one key, or group of a
    convolution; and on the model's own inputs into a Linear. What a residual stream with norms, or
    the model's output, needs has none. Where there is no example, or torch.export refuses the
    model, each convolution has gates on its outputs and each Linear on its inputs.

    Args:
        model: any module; its nn.Linear, nn.Conv1d/2d/3d and nn.ConvTranspose1d/2d/3d take part,
            and subclasses of them that keep their forward, which become layers of the base class;
            and transformers' Conv1D, a Linear whose weight is [in, out] (those inside PyTorch's
            fused attention modules do not, nor those whose weights something computes, such as
            weight_norm).
        gates: "auto", or "input", "output" or "weight" for every layer that takes part.
        include: only layers whose name matches a glob pattern (or one of several), or for which
            predicate(name, layer) is true.
        exclude: the same, left out.
        density_init: the density the gates start with, in (0, 1]: a number, or name pattern ->
            number (layers not named start at 0.9). Default 0.9.
        droprate_init: for replicating papers, see `L0Linear`; a number or a mapping.
        distribution: of the gates; HardConcrete() by default.
        noise: "batch" or "example", see `L0Linear`.
        depth: whether each residual branch (an attention, an MLP, a ResNet's block) has one more
            gate, on the whole of it: y = x + z * f(x). Closed, the branch is gone, and so is a
            block without a branch. The table has them; `graph.branches` says which are found.
        experts: whether each expert of a mixture has one more gate, too. Its router never picks a
            closed expert, and `prune` removes it; as many stay as each token needs. The table has
            them; `graph.mixtures` says which are found.
        example_inputs: what the model's forward takes: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments. A list that the model takes as one argument is one, and
            so is a NamedTuple. Where given, layers that never run on it are left out, and closed
            units can be skipped.
        skip: whether a training step leaves out the units whose gates are drawn closed; the step
            taken is the same. "auto": on a CPU, where it saves time. True: wherever units can be
            followed from the layers that make them to those that read them. False: nowhere. Needs
            `example_inputs`. On a GPU, True skips chains of linear layers without a host sync; in
            a model with convolutions the host reads the gates once a step.
        hidden: whether the hidden width has gates, too: one for each channel of a residual stream,
            shared by all its RMS norms. What writes into the stream (embeddings, the last layers
            of attention and MLP) and what reads it gets smaller with it. Needs gates="auto",
            `example_inputs`, and RMS norms in front of all that reads the stream: a layer norm
            takes the mean of all channels, so that none can go alone.
        uniform: whether layers that repeat, as in the blocks of a transformer, shall keep as many
            units each when the gates settle and in `prune`, so that a configuration can say it by
            one number.
        dry_run: change nothing, and return a table of what would have gates and why the others
            would not; it prints as a table.

    Raises:
        ValueError: no layer is left to gate, a pattern matches none, an option is out of range,
            the model does not take its example, or it is sharded or in DistributedDataParallel.
        TypeError: an option of a wrong type.

    Source: Gallego-Posada, Ramirez, Erraqabi, 2021 (structured gates).
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
        warnings.warn(f"sparsify_: {chosen.note}; {UNFOLLOWED}", stacklevel=2)
    if depth and not branches:
        refuse_no_branches(refused)
    if experts and not mixtures:
        refuse_no_experts(unmixed)
    names = [name for name in considered if choices[name].gates]
    if not names and not branches and not mixtures and not gated_layers(model):
        refuse_none(model, gates, choices, considered, computed)
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
