"""How long models take, measured beside each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

WARM_UP = 3
ROUNDS = 30


def forward_seconds(models: Mapping[str, nn.Module], inputs: Tensor) -> dict[str, float]:
    """The median seconds that each model takes for one forward of `inputs`, in evaluation.

    The models take turns, so that what else the machine does meets them alike. On CUDA each
    forward is waited for.
    """

    def synchronise() -> None:
        if inputs.is_cuda:
            torch.cuda.synchronize(inputs.device)

    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for round_ in range(WARM_UP + ROUNDS):
            for name, model in models.items():
                model.eval()
                synchronise()
                started = time.perf_counter()
                model(inputs)
                synchronise()
                if round_ >= WARM_UP:
                    seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}
