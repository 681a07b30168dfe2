"""The dense layers that can have gates."""

from __future__ import annotations

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


def dense_type_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch.nn that a class of layers computes the same as: it is that class, or a
    subclass which keeps its forward; None for others, and for lazy ones, which have no weight."""
    if issubclass(kind, LazyModuleMixin):
        return None
    for dense in LAYERS:
        if issubclass(kind, dense) and all(
            getattr(kind, name) is getattr(dense, name)
            for name in ("forward", "_conv_forward", "_output_padding")
            if hasattr(dense, name)
        ):
            return dense
    return None
