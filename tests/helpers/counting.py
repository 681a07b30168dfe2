"""How many operations a piece of code dispatches."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Counting(TorchDispatchMode):
    """Counts the operations dispatched."""

    NO_WORK = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "detach"})

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        """Those that compute, fill or copy: a launch or more each on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if not func.is_view and name not in self.NO_WORK:
            self.work[name] += 1
        return func(*args, **(kwargs or {}))


class CaptureSafe(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: the host reading a number, or sizes that depend on
    one, and tensors made from the host's data."""

    READS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2"})
    WRITES = frozenset({"lift_fresh", "lift"})  # what torch.tensor dispatches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.READS | self.WRITES:
            raise AssertionError(f"{name}: a captured graph could not hold it")
        return func(*args, **(kwargs or {}))
