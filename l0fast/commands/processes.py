"""The command as one of several processes that torchrun has started."""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from l0fast.training.ranks import Ranks


@contextmanager
def joined(args: argparse.Namespace) -> Generator[Ranks]:
    """Joins the other processes, if torchrun has started this one.

    On CUDA they use NCCL, each on the device of its LOCAL_RANK; else gloo. Only the first process
    shows its progress.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield Ranks()
        return
    cuda = torch.cuda.is_available() if args.device is None else args.device.startswith("cuda")
    if cuda:
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        ranks = Ranks.here()
        args.quiet = args.quiet or not ranks.first
        yield ranks
    finally:
        dist.destroy_process_group()
