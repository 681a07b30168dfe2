"""The costs of a call besides time: dispatched ops, reads by the host, kernels, memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.timing import Call


class Ops(NamedTuple):
    """Of one call."""

    non_view: int
    """Dispatched ops that are no views."""
    items: int
    """Reads of one number by the host (`.item()`), which wait for the device."""


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view and "record_function" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def dispatched(call: Call) -> Ops:
    """The ops that one call dispatches, forward, backward and optimizer alike."""
    with _Counter() as counter:
        call()
    return Ops(len(counter.names), counter.names.count("aten::_local_scalar_dense"))


def kernels(call: Call) -> list[str]:
    """The names of the kernels one call runs on the GPU, copies and fills included.

    Raises:
        RuntimeError: the profiler saw none.
    """
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    # The trace tells kernels from ranges; the profiler's event list lacks that in some versions.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    names = kernels_in(events)
    if not names:
        raise RuntimeError("the profiler saw no kernel")
    return names


def kernels_in(events: list[dict[str, Any]]) -> list[str]:
    """The names of what ran on the GPU, in a trace's order."""
    ran = {"kernel", "gpu_memcpy", "gpu_memset"}
    return [str(event["name"]) for event in events if event.get("cat") in ran]


def peak_mib(call: Call) -> float:
    """The most GPU memory one call takes on top of what is allocated before it, in MiB."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
