"""A CUDA graph's capture and replay, without CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from l0fast.training import cuda_graph
from tests.helpers.counting import CaptureSafe


class Stand:
    """Stands in for CUDA: a capture that runs nothing, and a replay that runs the same step."""

    def __init__(self, patch: pytest.MonkeyPatch, fail: bool = False) -> None:
        self.captured, self.replayed, self.fail = 0, 0, fail
        patch.setattr(cuda_graph, "why_not", lambda model, device: None)
        patch.setattr(cuda_graph, "_stream", lambda device: None)
        patch.setattr(cuda_graph, "_capture", self.capture)

    def capture(self, step: Callable[[], None], stream: Any) -> Callable[[], None]:
        self.captured += 1
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay() -> None:
            self.replayed += 1
            with CaptureSafe():
                step()

        return replay
