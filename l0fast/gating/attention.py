"""PyTorch's fused attention as ordinary layers, so that its heads can have gates and go."""

from __future__ import annotations

import inspect
import json
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import replace as replace_fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from l0fast.graph.calls import Example
from l0fast.graph.computed import why_computed
from l0fast.graph.sites import replace

UNFUSED = "unfused"
"""Attribute of the `out_proj` that `unfuse` made: its `Unfused`, as a text."""

_CALL = inspect.signature(nn.MultiheadAttention.forward)
_DEFAULTS = {
    name: parameter.default for name, parameter in _CALL.parameters.items() if name != "self"
}


@dataclass(frozen=True)
class Unfused:
    """A self-attention that was made ordinary, and how it is called; as JSON, a recipe's entry."""

    name: str
    embed_dim: int
    num_heads: int
    batch_first: bool
    batched: bool
    need_weights: bool
    average_attn_weights: bool
    attn_mask: str
    """"" for none, "bool" (True: not attended) or "float" (added)."""
    key_padding_mask: str

    def as_json(self) -> dict[str, Any]:
        """A dict that `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Unfused:
        """The one of a recipe's entry.

        Raises:
            ValueError, TypeError, KeyError: it is not one.
        """
        made = cls(**entry)
        kinds = {name: type(value).__name__ for name, value in vars(made).items()}
        if kinds != cls.__annotations__:
            raise ValueError("an entry that contradicts itself")
        return made


def _kind(mask: Tensor | None) -> str:
    return "" if mask is None else "bool" if mask.dtype == torch.bool else "float"


def _call_of(name: str, module: nn.MultiheadAttention, args: Any, options: Any) -> Unfused | str:
    """How an attention is called; in words why it cannot be made ordinary, where it cannot."""
    if not name:
        return "it is the model itself, which stays the object that it is"
    bound = _CALL.bind(module, *args, **options)
    bound.apply_defaults()
    given = bound.arguments
    query, mask = given["query"], given["attn_mask"]
    if not (query is given["key"] and query is given["value"]):
        return "its queries, keys and values are not one tensor"
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "it has kdim, vdim, add_bias_kv or add_zero_attn"
    if mask is not None and mask.dim() != 2:
        return "its mask is not the same for all heads"
    computed = why_computed(module, ("in_proj_weight", "in_proj_bias"))
    if computed := computed or why_computed(module.out_proj):
        return computed
    if query.is_nested:
        return "its input is nested"
    return Unfused(
        name=name,
        embed_dim=module.embed_dim,
        num_heads=module.num_heads,
        batch_first=module.batch_first,
        batched=query.dim() == 3,
        need_weights=given["need_weights"],
        average_attn_weights=given["average_attn_weights"],
        attn_mask=_kind(mask),
        key_padding_mask=_kind(given["key_padding_mask"]),
    )


def attention_calls(model: nn.Module, example: Example) -> dict[str, Unfused | str]:
    """Name of each nn.MultiheadAttention that runs on an example -> see `_call_of`."""
    found: dict[str, Unfused | str] = {}
    names = {
        module: name
        for name, module in model.named_modules()
        if type(module) is nn.MultiheadAttention
    }

    def note(module: Any, args: Any, options: Any) -> None:
        name = names[module]
        call = _call_of(name, module, args, options)
        found[name] = call if found.setdefault(name, call) == call else "it is called in two ways"

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for module in names
    ]
    # The fused forward of nn.TransformerEncoderLayer does not call its attention.
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if names:
            example.try_on(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    return found


class _Writer:
    """Writes a graph: a call of it is a call in the graph.

    Unpickling runs the graph on stand-ins for tensors, so that `is` cannot be asked in it.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        # What nn.MultiheadAttention's own forward takes.
        self.given = {
            name: self.graph.placeholder(name, default_value=default)
            for name, default in _DEFAULTS.items()
        }

    def __call__(self, function: Any, *args: Any, **options: Any) -> fx.Node:
        if isinstance(function, str):
            return self.graph.call_module(function, args)
        return self.graph.call_function(function, args, options)

    def require(self, holds: fx.Node, name: str, got: str, expected: str) -> None:
        """Refuses, with a RuntimeError, a call that is not like the one that the graph is for.

        A graph cannot raise what it likes; and torch._assert would be an AssertionError.
        """
        words = f"{name}: got {got}; expected {expected}, as in the example"
        self(torch.ops.aten._assert_scalar.default, holds, words)

    def mask(self, name: str, kind: str, query: fx.Node) -> fx.Node | None:
        """What a mask adds to the scores; it must be of that kind in each call."""
        mask = self.given[name]
        if not kind:
            self.require(self(operator.eq, mask, None), name, "a mask", "None")
            return None
        self.require(self(operator.ne, mask, None), name, "None", f"a {kind} mask")
        alike, other = (operator.eq, "float") if kind == "bool" else (operator.ne, "bool")
        dtype = self(getattr, mask, "dtype")
        self.require(self(alike, dtype, torch.bool), name, f"a {other} mask", f"a {kind} mask")
        if kind == "float":
            return mask
        barred = self(torch.where, mask, -math.inf, 0.0)
        return self.graph.call_method("type_as", (barred, query))  # as a function it has no name


def unfuse(attention: nn.MultiheadAttention, call: Unfused) -> fx.GraphModule:
    """The same self-attention of two Linears, `in_proj` and `out_proj`, which hold the very
    parameters; for calls like the one given: others raise a RuntimeError.

    Equals, H heads of D each:
        q, k, v = in_proj(query).unflatten(-1, (3, H, D))          # and transposed
        out_proj(scaled_dot_product_attention(q, k, v, mask)), weights or None

    The number of heads is not written in it: heads can be left out of both Linears.
    """
    size = attention.embed_dim // attention.num_heads
    layers: dict[str, nn.Module] = {}
    pairs = {
        "in_proj": (attention.in_proj_weight, attention.in_proj_bias),
        "out_proj": (attention.out_proj.weight, attention.out_proj.bias),
    }
    for name, (weight, bias) in pairs.items():
        layers[name] = layer = nn.Linear(weight.shape[1], weight.shape[0], False, device="meta")
        layer.weight = weight
        layer.register_parameter("bias", bias)

    # Layers of nn.TransformerEncoder ask their attention for it, and fuse what has it true. Copies
    # and pickles of a graph module keep only the modules that it calls: this one, which is empty
    # and so false, passes its input on.
    layers["batch_first"] = nn.Sequential()
    vars(layers["out_proj"])[UNFUSED] = json.dumps(call.as_json())

    write = _Writer()
    query = write("batch_first", write.given["query"])
    given, wanted = write.given["need_weights"], call.need_weights
    write.require(write(operator.eq, given, wanted), "need_weights", f"{not wanted}", f"{wanted}")
    # [*batch, length, 3, heads, size] -> [3, *batch, heads, length, size]
    if not call.batched:
        turn, back = (1, 2, 0, 3), (1, 0, 2)
    elif call.batch_first:
        turn, back = (2, 0, 3, 1, 4), (0, 2, 1, 3)
    else:
        turn, back = (2, 1, 3, 0, 4), (2, 0, 1, 3)
    split = write(torch.unflatten, write("in_proj", query), -1, (3, -1, size))
    parts = write(torch.unbind, write(torch.permute, split, turn))
    q, k, v = (write(operator.getitem, parts, place) for place in range(3))
    mask = write.mask("attn_mask", call.attn_mask, query)
    padding = write.mask("key_padding_mask", call.key_padding_mask, query)
    if padding is not None:
        for _ in range(2):  # over heads and queries
            padding = write(torch.unsqueeze, padding, -2)
        mask = padding if mask is None else write(torch.add, mask, padding)
    weights: fx.Node | None = None
    if call.need_weights or attention.dropout:
        layers["dropout"] = nn.Dropout(attention.dropout)
        scaled = write(torch.mul, q, size**-0.5)
        scores = write(torch.matmul, scaled, write(torch.transpose, k, -2, -1))
        scores = scores if mask is None else write(torch.add, scores, mask)
        weights = write("dropout", write(torch.softmax, scores, -1))
        y = write(torch.matmul, weights, v)
    else:
        y = write(F.scaled_dot_product_attention, q, k, v, attn_mask=mask)
    y = write("out_proj", write(torch.flatten, write(torch.permute, y, back), -2))
    if call.need_weights and call.average_attn_weights:
        weights = write(torch.mean, weights, -3)
    write.graph.output((y, weights if call.need_weights else None))
    module = fx.GraphModule(layers, write.graph, class_name="SelfAttention")
    return module.train(attention.training)


def unfuse_(model: nn.Module, calls: Mapping[str, Unfused]) -> nn.Module:
    """Makes attentions ordinary, in place; returns the root.

    An nn.TransformerEncoder around one no longer nests padded inputs, which its layers would need
    their fused attention for.
    """
    modules: dict[int, nn.Module] = {}
    for name, call in calls.items():
        attention = model.get_submodule(name)
        assert isinstance(attention, nn.MultiheadAttention)
        modules[id(attention)] = unfuse(attention, call)
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and any(
            id(module) in modules for module in encoder.modules()
        ):
            encoder.use_nested_tensor = False
    return replace(model, modules)


def unfused_in(model: nn.Module) -> list[Unfused]:
    """The attentions of a model that were made ordinary, by their names in it."""
    found: list[Unfused] = []
    for path, module in model.named_modules():
        fact = vars(module).get(UNFUSED)
        if fact is not None:  # the model may be a part of another one by now
            name = path.removesuffix(".layer").removesuffix(".out_proj")
            found.append(replace_fields(Unfused.from_json(json.loads(fact)), name=name))
    return found
