"""The dense layers that can have gates."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

DENSE_TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def dense_type_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class of torch.nn that a class of layers computes the same as: it is that class, or a
    subclass which keeps its forward; None for others, and for lazy ones, which have no weight."""
    if issubclass(kind, LazyModuleMixin):
        return None
    for dense in DENSE_TYPES:
        if issubclass(kind, dense) and all(
            getattr(kind, name) is getattr(dense, name)
            for name in ("forward", "_conv_forward")
            if hasattr(dense, name)
        ):
            return dense
    return None
