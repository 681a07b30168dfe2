"""Makes a model skip its closed units, once that is shown to leave its steps as they are."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from l0fast import _checks
from l0fast.graph.calls import Example, evaluating, own_randomness
from l0fast.graph.capture import Trace, export, train_but_norms
from l0fast.graph.channels import ELEMENTWISE
from l0fast.graph.compare import TOLERANCE, relative_error, tensors_of, values_of
from l0fast.graph.sites import light_copy, without_gates
from l0fast.graph.structure import structure_of
from l0fast.layers.handle import ModelGates, gated_layers, gates, handle_of, own_gates
from l0fast.layers.hooks import remove_hooks
from l0fast.layers.substitute import with_log_alpha
from l0fast.skipping import skip_on_device
from l0fast.skipping.following import stop_following
from l0fast.skipping.link import End, Link
from l0fast.skipping.links import find_links
from l0fast.skipping.skip import MULTIPLE, Skipping, size_of

SLACK = {torch.float64: 100.0, torch.float32: 100.0}
"""Times the tolerance of a pruned model: how much masked and skipped may differ by rounding. In
half precision it is that tolerance, of which a ViT takes a fifth: times 100 it would allow all."""
DRAWS = 3


def skip_closed(model: nn.Module, inputs: Any, options: Any) -> None:
    """Forward pre-hook, behind that of the draw: says which units each layer leaves out.

    Raises:
        RuntimeError: `model` is a replica of the one whose layers these are.
    """
    handle: ModelGates = _gates_of(model)
    if handle.skipping is None or torch.compiler.is_compiling():
        return
    if getattr(model, "_is_replica", False):
        # What a step leaves out is told to the model's own layers, and not to copies of them.
        raise RuntimeError(
            "skip: got a replica made by nn.DataParallel; expected "
            "nn.parallel.DistributedDataParallel, or a model prepared with skip=False"
        )
    handle.skipping.clear()  # a forward that was interrupted leaves its own behind
    draw = handle.board.latest
    if draw.live and draw.parts:
        call = Example(inputs, options)
        handle.skipping.assign(draw, call, lambda: _tried_out(model, handle.skipping, call))
        draw.parts = []


def _gates_of(model: nn.Module) -> ModelGates:
    """The handle of a model that has one."""
    handle = handle_of(model)
    assert handle is not None
    return handle


def stop_skipping(model: nn.Module) -> None:
    """Makes a model, and each part of it, compute with all units."""
    for module in model.modules():
        handle = handle_of(module)
        if handle is not None:
            handle.skipping = None
        remove_hooks(module, lambda hook: hook is skip_closed)
    stop_following(model)


def _start(model: nn.Module, skipping: Skipping) -> None:
    """Lets a model skip; undone by `stop_skipping`."""
    _gates_of(model).skipping = skipping
    if skip_closed not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(skip_closed, with_kwargs=True)


# --- the graph of a training step ---------------------------------------------------------------


class _Ops(TorchDispatchMode):
    """Notes the ops of a forward, but those on each element; noise is drawn for the units that are
    there, so that it counts."""

    PASSED_OVER = frozenset({*ELEMENTWISE, "aten::detach"})

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name not in self.PASSED_OVER:
            self.found.append((name, [tensor.shape for tensor in tensors_of(result)]))
        return result


def training_trace(model: nn.Module, example: Example) -> Trace:
    """The graph of a forward on an example in training: that of the model's structure, where
    training computes the same, or else one of its own.

    Raises:
        Exception: whatever the model or torch.export raises.
    """
    found: list[Any] = []
    with own_randomness(model), evaluating(model), without_gates(model) as plain:
        for training in (False, True):
            if training:
                train_but_norms(plain)
            with _Ops() as ops:
                given = values_of(example.copy().call(plain))
            found.append((ops.found, [tensor.shape for tensor in given]))
        if found[0] != found[1]:
            return export(plain, example)
    structure = structure_of(model, example)
    if structure.trace is None or structure.failure:
        raise RuntimeError(f"torch.export refuses the model: {structure.failure}")
    return structure.trace


# --- whether it is the same ---------------------------------------------------------------------


def _outputs(model: nn.Module, example: Example, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [tensor.detach().clone() for tensor in values_of(example.copy().call(model))]


def _on_gpu(model: nn.Module) -> bool:
    return any(layer.log_alpha.is_cuda for layer in gated_layers(model).values())


def _error(model: nn.Module, example: Example, links: list[Link]) -> float:
    """The largest relative difference between masked and skipped forwards of the example.

    It is the model itself that runs, with other gates; afterwards all is as it was.
    """
    layers, worst = _gates_of(model).layers, 0.0
    with own_randomness(model), evaluating(model):
        for layer in layers.values():
            layer.training = True
        try:
            skipping = Skipping(model, links, True, example, 1, _on_gpu(model))
            _start(model, skipping)
            for draw in range(DRAWS):
                torch.manual_seed(draw)
                values = {
                    name: torch.empty_like(layers[name].log_alpha).normal_(0.0, 2.0)
                    for name in own_gates(layers)
                }
                with with_log_alpha(layers, values):
                    _gates_of(model).skipping = None
                    expected = _outputs(model, example, draw)
                    _gates_of(model).skipping = skipping
                    worst = max(worst, relative_error(_outputs(model, example, draw), expected))
        finally:
            stop_skipping(model)
            for layer in layers.values():
                layer._forget_draws()  # they were of other gates
    return worst


def _allowed(model: nn.Module) -> float:
    """How much masked and skipped may differ."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    return max(
        SLACK.get(one, 1.0) * TOLERANCE.get(one, TOLERANCE[torch.bfloat16]) for one in dtypes
    )


def _ends(model: nn.Module, links: list[Link]) -> list[Any]:
    """What decides what links leave out: the ends of each, by the names of the layers."""
    names = {id(module): name for name, module in model.named_modules()}

    def of(end: End) -> tuple[str, list[int] | None]:
        return names[id(end.layer)], None if end.labels is None else end.labels.tolist()

    return [
        (list(map(of, link.makers)), list(map(of, link.readers)), link.channels, link.zeros)
        for link in links
    ]


def _tried_out(model: nn.Module, skipping: Skipping, call: Example) -> float | None:
    """The size that takes as long as the example, in calls of the form of this one; None where
    they are to be computed masked.

    A call may compute more than the example: a loss, where it has labels. The same units must be
    followed along its own graph, and leaving them out must change nothing. It is all done on a
    copy of the modules: the model is in the midst of a step.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    try:
        with contextlib.ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            twin, call = light_copy(model), call.copy()
            stop_skipping(twin)
            links = find_links(twin, training_trace(twin, call), skipping.views)
            if _ends(twin, links) != _ends(model, skipping.links):
                return None
            if _error(twin, call, links) > _allowed(model):
                return None
    except Exception:
        return None
    takes, of_example = (sum(link.work for link in some) for some in (links, skipping.links))
    return size_of(call) * (of_example / takes if takes and of_example else 1.0)


def attach_skipping(model: nn.Module, example: Example, skip: str | bool) -> None:
    """Makes each step of a model leave out the units that its draw has closed.

    Tried out on the example, masked against skipped. Where that fails, "auto" skips nothing.

    Raises:
        ValueError: `skip` is True, and the model cannot skip.
    """
    stop_skipping(model)
    gates(model)
    on_gpu = _on_gpu(model)
    if skip is False or (skip == "auto" and on_gpu):
        return  # what it saves there has not been measured
    failure = ""
    try:
        trace = training_trace(model, example)
    except Exception as problem:
        trace, failure = None, _checks.one_line(problem)
    # A model may reshape to sizes that it has written out: the second time units stop there.
    for views in (True, False):
        if trace is None:
            break
        try:
            links = find_links(model, trace, views)
            error = _error(model, example, links) if links else 0.0
        except Exception as problem:
            failure = _checks.one_line(problem)
            continue
        if links and error <= _allowed(model):
            multiple = skip_on_device.MULTIPLE if on_gpu else MULTIPLE
            _start(model, Skipping(model, links, skip, example, multiple, on_gpu, views))
            return
        failure = f"it differs by {error:.3g}" if links else "no units can be followed"
    if skip is True:
        _checks.refuse("skip", skip, f"'auto' or False for this model ({failure})")
