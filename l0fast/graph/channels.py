"""What each op does to the units of a tensor: the table that `liveness` follows.

An op that is not in the table reads every value it is given, and nothing is known of what it gives.
"""

from __future__ import annotations

from torch.fx import Node

from l0fast.graph.mixing import along, attention, join, matmul, norm, reduction
from l0fast.graph.nodes import op_name
from l0fast.graph.rules import dropout, elementwise, like, move, pad, same, spatial, view
from l0fast.graph.units import Rule


def _aten(names: str, *, in_place: bool = False) -> list[str]:
    found = [f"aten::{name}" for name in names.split()]
    return found + [f"{name}_" for name in found] if in_place else found


ELEMENTWISE = _aten(
    "abs add celu clamp clamp_max clamp_min cos div elu erf exp gelu hardshrink hardsigmoid "
    "hardswish hardtanh leaky_relu log_sigmoid mish mul neg pow relu relu6 rsqrt rsub selu sigmoid "
    "silu sin softplus softshrink sqrt square sub tanh threshold",
    in_place=True,
)
"""Ops on each element; those with a number as a second argument may have a tensor instead."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_aten("alias clone contiguous detach to"), same),
    "aten::type_as": like,
    **dict.fromkeys(_aten("dropout feature_dropout", in_place=True), dropout),
    **dict.fromkeys(
        _aten(
            "cat chunk expand flatten movedim narrow permute repeat repeat_interleave reshape "
            "select slice split split_with_sizes squeeze stack swapaxes swapdims transpose unbind "
            "unflatten unsqueeze mT"
        ),
        move,
    ),
    **dict.fromkeys(_aten("view _unsafe_view"), view),
    **{
        f"aten::{kind}{dims}d": spatial(dims, means=kind != "avg_pool")
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for dims in (1, 2, 3)
    },
    "aten::upsample_nearest2d": spatial(2, means=True),
    "aten::upsample_bilinear2d": spatial(2, means=True),
    "aten::pad": pad,
    **dict.fromkeys(_aten("mean sum"), reduction),
    "aten::softmax": along(1),
    **dict.fromkeys(_aten("layer_norm rms_norm"), norm),
    **dict.fromkeys(_aten("matmul bmm"), matmul),
    "aten::scaled_dot_product_attention": attention,
}
"""Op -> rule."""

JOINS = _aten("add div masked_fill maximum minimum mul sub where", in_place=True)
"""Ops on each element of several tensors."""

_SEVERAL = _aten("bmm cat layer_norm matmul rms_norm scaled_dot_product_attention stack type_as")
"""Ops with a rule that may have several tensors."""

RIGID = set(
    _aten(
        "chunk expand narrow repeat reshape select slice split split_with_sizes unflatten view "
        "_unsafe_view unbind"
    )
)
"""Ops that a model may call with sizes written out, as in `x.view(-1, 800)`."""

IGNORED = {"aten::_assert_tensor_metadata"}
"""Ops that read no values."""


def rule_for(node: Node) -> Rule | None:
    """The rule of a node's op."""
    name = op_name(node)
    if len(node.all_input_nodes) > 1 and name in JOINS:
        return join
    if len(node.all_input_nodes) > 1 and name not in _SEVERAL:
        return None
    first = node.args[0] if node.args else None
    return RULES.get(name) if isinstance(first, (Node, list, tuple)) else None
