"""The dense layers that can have gates."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
"""Classes whose weight is [in, out / groups, *kernel], and not [out, in / groups, *kernel]."""

LAYERS: dict[type[nn.Module], int] = {
    nn.Linear: 0,
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    **{kind: dims for dims, kind in enumerate(TRANSPOSED, 1)},
}
"""Classes of layers that can be made smaller -> how many dimensions follow their channels."""


_IN_OUT = ("transformers.pytorch_utils.Conv1D",)
"""Classes of other libraries that are a Linear of `nx` inputs and `nf` outputs whose weight is
[nx, nf]. They are known by their names: no library is imported for them."""


_LINEAR = ("transformers.models.falcon.modeling_falcon.FalconLinear",)
"""Subclasses of nn.Linear with a forward of their own that computes the same; known by their
names, too."""


def _named(kind: type, names: tuple[str, ...]) -> bool:
    return f"{kind.__module__}.{kind.__qualname__}" in names


def _is_in_out(kind: type) -> bool:
    return _named(kind, _IN_OUT)


def is_rewritten(module: nn.Module) -> bool:
    """Whether a module is a Linear whose class computes the same in several ops."""
    return _named(type(module), _LINEAR)


def dense_type_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The dense class that a class of layers computes the same as: it is that class, or a subclass
    which keeps its forward; None for others, and for lazy ones, which have no weight."""
    if issubclass(kind, LazyModuleMixin):
        return None
    if _named(kind, _LINEAR):
        return nn.Linear
    for dense in filter(_is_in_out, kind.__mro__):
        return dense if kind.forward is dense.forward else None
    for dense in LAYERS:
        if issubclass(kind, dense) and all(
            getattr(kind, name) is getattr(dense, name)
            for name in ("forward", "_conv_forward", "_output_padding")
            if hasattr(dense, name)
        ):
            return dense
    return None


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a layer; of a gated one or of a subclass, the dense class that it stands for."""
    gated = getattr(module, "dense_type", None)
    return gated or dense_type_of(type(module)) or type(module)


def inner_dims(module: nn.Module) -> int | None:
    """How many dimensions follow the channels of a layer; None for what is no layer."""
    kind = kind_of(module)
    return 0 if _is_in_out(kind) else LAYERS.get(kind)


def is_in_out(layer: Any) -> bool:
    """Whether a layer is a Linear whose weight is [in, out]."""
    return _is_in_out(kind_of(layer))


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is a Linear, with its weight either way."""
    return isinstance(layer, nn.Linear) or is_in_out(layer)


def inputs_first(layer: Any) -> bool:
    """Whether the first dimension of a layer's weight is that of its inputs."""
    return isinstance(layer, TRANSPOSED) or is_in_out(layer)
