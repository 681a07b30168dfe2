"""Processes of one training, forked from one that has loaded PyTorch, and done nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch

LOADED = ["l0fast", "l0fast.training.trainer", "sklearn.datasets", "torch.export", "torch._dynamo"]


def run_processes(of: Callable[..., None], *arguments: Any) -> None:
    """Calls `of(rank, *arguments)` in two processes, and waits for them."""
    multiprocessing.set_forkserver_preload(LOADED)
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        of, arguments, nprocs=2, start_method="forkserver"
    )
