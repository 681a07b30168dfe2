"""Triton kernels of l0fast: sampling, masking and the expected L0 norm in one pass each way, and
linear layers over the units that are open.

The launchers take torch tensors and return new ones; they trust their caller, who has checked
everything (l0fast.functional does). Nothing here imports l0fast.
"""

from l0fast_kernels.advance import advance_
from l0fast_kernels.bounded_matmul import bounded_matmul_forward
from l0fast_kernels.compaction import compaction_forward
from l0fast_kernels.gate_adam import gate_adam_
from l0fast_kernels.gated_weight import gated_weight_backward, gated_weight_forward
from l0fast_kernels.hard_concrete import hard_concrete_backward, hard_concrete_forward
from l0fast_kernels.lagrangian import (
    MOST_CONSTRAINTS,
    ascend_,
    lagrangian_backward,
    lagrangian_forward,
)
from l0fast_kernels.launch import Constants, constants, interpreted
from l0fast_kernels.packed_weight import pack, unpack
from l0fast_kernels.scaled_weight import scaled_weight_backward, scaled_weight_forward

__all__ = [
    "MOST_CONSTRAINTS",
    "Constants",
    "advance_",
    "ascend_",
    "bounded_matmul_forward",
    "compaction_forward",
    "constants",
    "gate_adam_",
    "gated_weight_backward",
    "gated_weight_forward",
    "hard_concrete_backward",
    "hard_concrete_forward",
    "interpreted",
    "lagrangian_backward",
    "lagrangian_forward",
    "pack",
    "scaled_weight_backward",
    "scaled_weight_forward",
    "unpack",
]
