"""What each op does to the units of a tensor: the table that `liveness` follows.

An op that is not in the table reads every value it is given, and nothing is known of what it gives.
"""

from __future__ import annotations

from torch.fx import Node

from l0fast.graph.joins import (
    added_product,
    at_places,
    attention,
    einsum,
    join,
    matmul,
    shaped_like,
)
from l0fast.graph.mixing import along, glu, group_norm, instance_norm, norm, reduction
from l0fast.graph.nodes import op_name
from l0fast.graph.rules import (
    dropout,
    elementwise,
    filled,
    gathered,
    like,
    move,
    pad,
    roll,
    rows,
    same,
    shuffled,
    slope,
    spatial,
    taken,
    view,
)
from l0fast.graph.units import Rule


def _aten(names: str, *, in_place: bool = False) -> list[str]:
    found = [f"aten::{name}" for name in names.split()]
    return found + [f"{name}_" for name in found] if in_place else found


ELEMENTWISE = _aten(
    "abs acos acosh add asin asinh atan atanh ceil celu clamp clamp_max clamp_min cos cosh div elu "
    "eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmod frac ge gelu gt hardshrink "
    "hardsigmoid hardswish hardtanh le leaky_relu lgamma log log10 log1p log2 log_sigmoid "
    "logical_not logit lt mish mul nan_to_num ne neg pow reciprocal relu relu6 remainder round "
    "rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink sqrt square sub tan "
    "tanh threshold trunc",
    in_place=True,
)
"""Ops on each element; those with a number as a second argument may have a tensor instead."""

_UPSAMPLED = {
    1: "upsample_nearest1d _upsample_nearest_exact1d upsample_linear1d",
    2: "upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa "
    "upsample_bicubic2d _upsample_bicubic2d_aa",
    3: "upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d",
}
"""Dimensions -> the ops that scale so many."""

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(_aten("alias clone contiguous detach detach_ lift_fresh_copy to"), same),
    "aten::type_as": like,
    **dict.fromkeys(_aten("full_like ones_like zeros_like"), filled),
    **dict.fromkeys(
        _aten("alpha_dropout dropout feature_alpha_dropout feature_dropout", in_place=True), dropout
    ),
    **dict.fromkeys(
        _aten(
            "broadcast_to cat chunk expand flatten flip movedim narrow permute repeat "
            "repeat_interleave reshape select slice split split_with_sizes squeeze stack swapaxes "
            "swapdims t tile transpose unbind unflatten unsqueeze mT"
        ),
        move,
    ),
    **dict.fromkeys(_aten("view _unsafe_view"), view),
    **{
        f"aten::{kind}{dims}d": spatial(dims, means=kind != "avg_pool")
        for kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
        for dims in (1, 2, 3)
    },
    **{name: spatial(dims, means=True) for dims, ops in _UPSAMPLED.items() for name in _aten(ops)},
    "aten::pad": pad,
    "aten::roll": roll,
    "aten::pixel_shuffle": shuffled(-3),
    "aten::col2im": shuffled(-2),
    **dict.fromkeys(_aten("im2col pixel_unshuffle"), gathered(-3)),
    **dict.fromkeys(_aten("index index_select"), taken),
    "aten::embedding": rows,
    **dict.fromkeys(_aten("gather index_add scatter_add"), at_places),
    **dict.fromkeys(
        _aten(
            "all amax amin any argmax argmin logsumexp max mean min prod std std_mean sum var "
            "var_mean"
        ),
        reduction(1),
    ),
    "aten::linalg_vector_norm": reduction(2),
    **dict.fromkeys(_aten("log_softmax softmax"), along(1)),
    "aten::cumsum": along(1, zeros=True),
    "aten::glu": glu,
    "aten::prelu": slope,
    **dict.fromkeys(_aten("expand_as reshape_as view_as"), shaped_like),
    "aten::einsum": einsum,
    **dict.fromkeys(_aten("layer_norm rms_norm"), norm),
    "aten::group_norm": group_norm,
    "aten::instance_norm": instance_norm,
    **dict.fromkeys(_aten("bmm matmul mm"), matmul),
    "aten::baddbmm": added_product,
    "aten::scaled_dot_product_attention": attention,
}
"""Op -> rule."""

JOINS = _aten(
    "add addcdiv addcmul atan2 clamp clamp_max clamp_min div eq floor_divide fmod ge gt hypot le "
    "lerp logical_and logical_or lt masked_fill max maximum min minimum mul ne pow remainder sub "
    "where",
    in_place=True,
)
"""Ops on each element of several tensors."""

_SEVERAL = _aten(
    "baddbmm bmm cat einsum embedding expand_as gather group_norm index index_add index_select "
    "layer_norm matmul mm prelu reshape_as rms_norm scaled_dot_product_attention scatter_add stack "
    "type_as view_as"
)
"""Ops with a rule that may have several tensors."""

RIGID = set(
    _aten(
        "broadcast_to chunk expand narrow repeat reshape select slice split split_with_sizes tile "
        "unflatten view _unsafe_view unbind group_norm"
    )
)
"""Ops that a model may call with sizes written out, as in `x.view(-1, 800)`, or with a number of
groups."""

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
    return RULES.get(name) if isinstance(first, (Node, list, tuple, str)) else None
