"""What names the noise of a draw: the seed and the offset of PyTorch's generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from l0fast import functional
from l0fast.autograd import noise
from l0fast.maths import philox
from tests.helpers.counting import Counting

CUDA = torch.device("cuda", 0)


class Generator:
    """Stands for the generator of a GPU."""

    def __init__(self, seed: int, offset: int) -> None:
        self.seed, self.offset = seed, offset

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    made = Generator(2**64 - 3, 4 * (2**33 + 5))
    monkeypatch.setattr(torch.cuda, "default_generators", (made,))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return made


def test_a_draw_is_named_by_seed_and_offset_and_moves_on(generator: Generator) -> None:
    first, second = noise.noise_name(CUDA), noise.noise_name(CUDA)
    key = philox.signed((2**64 - 3) ^ noise.KEY)
    assert first == (key, 5, 2)
    assert second == (key, 6, 2)
    assert generator.offset == 4 * (2**33 + 7)
    generator.offset -= 8
    assert noise.noise_name(CUDA) == first
    generator.seed += 1
    assert noise.noise_name(CUDA) != second


def test_captures_compilers_and_dispatch_modes_draw_a_tensor(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "_drawn", lambda device: "a tensor")
    assert noise.noise_name(CUDA) != "a tensor"
    assert noise.noise_name(torch.device("cpu")) == "a tensor"
    with Counting():
        assert noise.noise_name(CUDA) == "a tensor"
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert noise.noise_name(CUDA) == "a tensor"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert noise.noise_name(CUDA) == "a tensor"


@pytest.mark.gpu
def test_gates_on_a_gpu_follow_its_generator() -> None:
    log_alpha = torch.zeros(64, device="cuda")

    def draw() -> Any:
        return functional.hard_concrete(log_alpha).z.tolist()

    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first, second = draw(), draw()
    assert first != second
    torch.manual_seed(3)
    assert [draw(), draw()] == [first, second]
    torch.cuda.set_rng_state(state)
    assert draw() == first
    torch.manual_seed(4)
    assert draw() != first


@pytest.mark.gpu
def test_a_replayed_graph_draws_gates_of_its_own() -> None:
    log_alpha = torch.zeros(64, device="cuda")
    functional.hard_concrete(log_alpha)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = functional.hard_concrete(log_alpha).z
    found = []
    for _ in range(3):
        graph.replay()
        found.append(z.tolist())
    assert found[0] != found[1] != found[2] != found[0]
    torch.manual_seed(7)
    graph.replay()
    again = z.tolist()
    torch.manual_seed(7)
    graph.replay()
    assert z.tolist() == again
