"""How often torch.export runs, and how often the whole model is copied."""

from __future__ import annotations

import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn


@dataclass
class Work:
    """What was counted since `counting` began."""

    exports: int = 0
    reduced: int = 0
    """Objects that `copy` or `pickle` made copies of."""
    ran: int = 0
    """Objects that ran, other than the model itself: copies put together by hand are among them."""

    @property
    def copies(self) -> int:
        """Copies of the whole model, with or without its weights."""
        return max(self.reduced, self.ran)


@contextmanager
def counting(model: nn.Module) -> Generator[Work]:
    """Counts exports, and copies of objects of the model's class; not those in torch.export."""
    work = Work()
    kind: Any = type(model)
    export, call, reduce = torch.export.export, kind.__call__, kind.__reduce_ex__
    ran = weakref.WeakSet[nn.Module]([model])
    exporting = False

    def counted_export(*args: Any, **kwargs: Any) -> Any:
        nonlocal exporting
        work.exports += 1
        exporting = True
        try:
            return export(*args, **kwargs)
        finally:
            exporting = False

    def counted_reduce(self: nn.Module, protocol: Any) -> Any:
        work.reduced += not exporting
        return reduce(self, protocol)

    def counted_call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self not in ran and not exporting:
            ran.add(self)
            work.ran += 1
        return call(self, *args, **kwargs)

    with (
        mock.patch.object(torch.export, "export", counted_export),
        mock.patch.object(kind, "__reduce_ex__", counted_reduce),
        mock.patch.object(kind, "__call__", counted_call),
    ):
        yield work
