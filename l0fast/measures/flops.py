"""What one forward of a model takes: parameters, multiply-accumulates, activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from l0fast.graph.calls import evaluating, example_args
from l0fast.layers.handle import gated_layers


def count_params(model: nn.Module) -> int:
    """Parameters of a model, each tensor once; the gates' log_alpha do not count."""
    gates = {id(layer.log_alpha) for layer in gated_layers(model).values()}
    return sum(p.numel() for p in model.parameters() if id(p) not in gates)


def count_macs(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Multiply-accumulates of one forward on `example_inputs`, by module name ("" is all).

    Matrix products and convolutions count, as `torch.utils.flop_counter` does.
    """
    return {name: flops // 2 for name, flops in _counted(model, example_inputs).items()}


def count_activations(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """Elements that the layers of a model give in one forward on `example_inputs`, by module name
    ("" is all): the outputs of Linears, convolutions, batch norms and products of matrices.

    Source: Radosavovic et al., 2020 (activations: the size of the output tensors of layers).
    """
    from torch.utils.flop_counter import flop_registry

    def elements(*_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
        return math.prod(out_shape if isinstance(out_shape[0], int) else out_shape[0])

    norms = (op for name in BATCH_NORMS if (op := getattr(torch.ops.aten, name, None)))
    return _counted(model, example_inputs, dict.fromkeys([*flop_registry, *norms], elements))


BATCH_NORMS = ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")


def _counted(model: nn.Module, example_inputs: Any, formulas: Any = None) -> dict[str, int]:
    """What the ops of one forward sum up to, by module name; by default their FLOPs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # it loads Triton

    fused = torch.backends.mha.get_fastpath_enabled()
    names = {id(module): name for name, module in model.named_modules()}
    root = type(model).__name__
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    try:
        # Attention in one fused op would count for nothing.
        torch.backends.mha.set_fastpath_enabled(False)
        with evaluating(model), sdpa_kernel(SDPBackend.MATH), counter:
            model(*example_args(example_inputs))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    counts = counter.get_flop_counts()
    found = {name: sum(counts.get(f"{root}.{name}", {}).values()) for name in names.values()}
    return found | {"": counter.get_total_flops()}
