"""What one forward of a model takes: parameters, multiply-accumulates, activations."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from l0fast.graph.calls import Example, evaluating
from l0fast.graph.compare import values_of
from l0fast.layers.handle import gated_layers


def count_params(model: nn.Module) -> int:
    """Parameters of a model, each tensor once; the gates' log_alpha do not count."""
    gates = {id(layer.log_alpha) for layer in gated_layers(model).values()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def count_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Multiply-accumulates of one forward on `example_inputs`, by module name ("" is all).

    Matrix products and convolutions count, as `torch.utils.flop_counter` does.

    Raises:
        ValueError: the model does not take the example.
    """
    example = Example.of(example_inputs, model)
    try:
        return count_ops(model, example).macs
    except Exception as error:
        example.refuse(error)


class Ops(NamedTuple):
    """What one forward of a model does; each by module name ("" is all)."""

    macs: dict[str, int]
    """Multiply-accumulates, see `count_macs`."""
    elements: dict[str, int]
    """That its layers give: the outputs of Linears, convolutions, batch norms and products of
    matrices.

    Source: Radosavovic et al., 2020 (activations: the size of the output tensors of layers)."""
    outputs: list[tuple[torch.Size, torch.dtype]]
    """Shape and dtype of each tensor that the model gives."""


BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")


def _elements(*_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    return math.prod(out_shape if isinstance(out_shape[0], int) else out_shape[0])


def _of_groups(rows: Any, *_args: Any, out_shape: Any, **_kwargs: Any) -> int:
    """Of a product of groups of rows, each with a matrix of its own."""
    return 2 * rows[-1] * _elements(out_shape=out_shape)


@contextmanager
def _without_gradients(model: nn.Module) -> Generator[None]:
    """No parameter of a model requires a gradient inside; afterwards those that did do so again.

    The counters put hooks on the gradients of what a module gives. A view of a parameter that
    requires a gradient has none to put a hook on without autograd.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _recurrent_in_steps(model: nn.Module) -> Generator[None]:
    """Inside, an LSTM is computed step by step: one fused op would count for nothing."""
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        yield
        return
    fused: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
    before = [library.enabled for library in fused]
    try:
        for library in fused:
            library.enabled = False
        yield
    finally:
        for library, enabled in zip(fused, before, strict=True):
            library.enabled = enabled


@contextmanager
def _in_plain_ops(model: nn.Module) -> Generator[None]:
    """Attention in one fused op would count for nothing, and asks for real weights."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with (
            evaluating(model),
            _without_gradients(model),
            _recurrent_in_steps(model),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _shapes(given: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in values_of(given)]


def output_shapes(model: nn.Module, example: Example) -> list[tuple[torch.Size, torch.dtype]]:
    """What `count_ops` says of the outputs, in less time."""
    with _in_plain_ops(model):
        return _shapes(example.call(model))


def count_ops(model: nn.Module, example: Example) -> Ops:
    """Counts what one forward of `model` on an example does."""
    from torch.utils.flop_counter import FlopCounterMode, flop_registry  # it loads Triton

    norms = (op for name in BATCH_NORMS if (op := getattr(torch.ops.aten, name, None)))
    formulas: dict[Any, Any] = dict.fromkeys([*flop_registry, *norms], _elements)
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)
    if grouped is not None:
        formulas[grouped] = _elements
    flops = FlopCounterMode(display=False, custom_mapping={grouped: _of_groups} if grouped else {})
    elements = FlopCounterMode(display=False, custom_mapping=formulas)
    with _in_plain_ops(model), flops, elements:
        outputs = _shapes(example.map(Tensor.detach).call(model))
    macs = {name: count // 2 for name, count in _by_module(flops, model).items()}
    return Ops(macs, _by_module(elements, model), outputs)


def _by_module(counter: Any, model: nn.Module) -> dict[str, int]:
    """What a counter has summed up, by module name."""
    counts, root = counter.get_flop_counts(), type(model).__name__
    names = {id(module): name for name, module in model.named_modules()}
    found = {name: sum(counts.get(f"{root}.{name}", {}).values()) for name in names.values()}
    return found | {"": counter.get_total_flops()}
