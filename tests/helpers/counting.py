"""How many operations a piece of code dispatches."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Counting(TorchDispatchMode):
    """Counts the operations dispatched."""

    NO_WORK = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "detach"})

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.work: Counter[str] = Counter()
        """Those that compute, fill or copy: a launch or more each on a GPU."""
        self.elements: Counter[str] = Counter()
        """How many elements these read and write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in self.NO_WORK:
            self.work[name] += 1
            tensors = [one for one in tree_leaves((args, out)) if isinstance(one, Tensor)]
            self.elements[name] += sum(one.numel() for one in tensors)
        return out


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
