"""The binding: each op's forward and hand-derived backward as one node of autograd.

Two of them for every op, and `runs_on_triton` chooses per call: `functions` (autograd Functions
over the reference maths: a custom op costs four times as much a call on a CPU) and `ops`
(torch.library ops over the Triton kernels). `compact` has what layers compute with what is open.
"""

from l0fast.autograd.advance import advance_
from l0fast.autograd.apart import draw_apart, lie_apart
from l0fast.autograd.backend import runs_on_triton
from l0fast.autograd.compact import compact_weight, gated_linear, gather
from l0fast.autograd.functions import gated_weight, hard_concrete, segment_sums
from l0fast.autograd.gate_adam import Pull, gate_adam_, runs_at_once
from l0fast.autograd.lagrangian import ascend_, lagrangian
from l0fast.autograd.ops import triton_gated_weight, triton_hard_concrete
from l0fast.autograd.scaled_weight import scaled_weight
from l0fast.autograd.skipping import compaction, skipping_linear

__all__ = [
    "Pull",
    "advance_",
    "ascend_",
    "compact_weight",
    "compaction",
    "draw_apart",
    "gate_adam_",
    "gated_linear",
    "gated_weight",
    "gather",
    "hard_concrete",
    "lagrangian",
    "lie_apart",
    "runs_at_once",
    "runs_on_triton",
    "scaled_weight",
    "segment_sums",
    "skipping_linear",
    "triton_gated_weight",
    "triton_hard_concrete",
]
