"""An attached step in a CUDA graph: what it counts on the host is counted after each replay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, gates, sparsify_
from tests.helpers.capture import capture

pytestmark = pytest.mark.filterwarnings(
    "ignore:attach. 24 steps are few", "ignore:settle. the expected density"
)

STEPS = 24
WARM = 3


class Training:
    """A small attached training, whose steps may be captured."""

    def __init__(self, start: float) -> None:
        torch.manual_seed(0)
        self.model = sparsify_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
        self.x = torch.randn(5, 6)
        self.sgd = torch.optim.SGD(self.model.parameters(), 1e-2)
        self.constraint = DensityConstraint(self.model, 0.5, steps=STEPS)
        self.constraint.attach(self.sgd, start=start, settle=0.25)

    def step(self) -> None:
        self.model(self.x).square().mean().backward()
        self.sgd.step()
        self.sgd.zero_grad()

    def state(self) -> list[Tensor]:
        state = self.sgd.state_dict()["l0fast"]
        moments = [one[name] for one in state["gates"].values() for name in sorted(one)]
        return [*self.model.state_dict().values(), *self.constraint.buffers(), *moments]


def captured(training: Training, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    with patch.context() as inner:
        inner.setattr(torch.cuda, "is_initialized", lambda: True)
        inner.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        return capture(training.step)


def test_replays_that_are_counted_are_the_ordinary_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, graphed = Training(0.25), Training(0.25)
    torch.manual_seed(1)
    for _ in range(STEPS):
        plain.step()
    torch.manual_seed(1)
    replay: Callable[[], None] | None = None
    ordinary = captures = 0
    for _ in range(STEPS):
        starting = graphed.constraint.starting
        if starting or ordinary < WARM:
            ordinary += not starting
            graphed.step()
            if starting != graphed.constraint.starting:
                ordinary = 0
            continue
        if replay is None:
            before = graphed.constraint.attachment
            assert before is not None
            taken = before.taken
            replay = captured(graphed, monkeypatch)
            captures += 1
            assert before.taken == taken  # nothing has run
        replay()
        if graphed.constraint.count_():
            replay = None
            assert graphed.constraint.settled
            ordinary = 0
    assert captures == 2
    assert graphed.constraint.attachment is not None
    assert graphed.constraint.attachment.taken == STEPS
    assert gates(graphed.model).settled
    for one, other in zip(graphed.state(), plain.state(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_capture_at_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(0.25)
    with pytest.raises(RuntimeError, match=r"got optimizer.step\(\) in a CUDA graph while all"):
        captured(training, monkeypatch)
    assert training.constraint.attachment is not None
    assert training.constraint.attachment.taken == 0


def test_a_step_that_is_not_captured_counts_itself() -> None:
    training = Training(0.0)
    training.step()
    assert training.constraint.attachment is not None
    assert training.constraint.attachment.taken == 1
    assert not training.constraint.count_()
    assert training.constraint.attachment.taken == 2
