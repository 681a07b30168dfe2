"""The step as one CUDA graph: captured and replayed for real on a GPU; elsewhere its operations
are, and what a graph could not hold is refused (see `tests.helpers.capture`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import l0fast
from l0fast.data.sets import Data, Split
from l0fast.layers.handle import gated_layers
from l0fast.pruning import shrink
from l0fast.skipping import attach
from l0fast.training import cuda_graph
from l0fast.training import trainer as trainers
from l0fast.training.cuda_graph import ORDINARY, Steps
from l0fast.training.models import build
from l0fast.training.settings import TrainerSettings
from l0fast.training.trainer import Trainer
from tests.helpers.capture import Stand
from tests.helpers.draws import drawn as of_latest
from tests.helpers.thinned import telling, thinned

BATCH = 32
SETTINGS = TrainerSettings(density=0.4, epochs=2, batch_size=BATCH, lr=1e-2, settle=0, start=0)
MODELS = {"mlp": (32, 16), "lenet5": (4, 6, 12)}


@pytest.fixture(scope="module")
def data() -> Data:
    """Nine whole batches and a smaller one, of a rule that can be learned."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(9 * BATCH + 5, 1, 8, 8, generator=generator)
    split = Split(inputs, inputs[:, 0, 0].argmax(1))
    return Data(split, None, split, 10)


def trainer(
    data: Data, out: Path | None = None, model: str = "mlp", device: str = "cpu", **changes: Any
) -> Trainer:
    torch.manual_seed(0)
    made = build(model, (1, 8, 8), 10, MODELS[model])
    settings = dataclasses.replace(SETTINGS, **changes)
    return Trainer(made, data, settings, out=out, device=device)


def weights(one: Trainer) -> list[Tensor]:
    term: Any = one.term
    tensors = [*one.model.state_dict().values(), *([] if term is None else term.buffers())]
    return [tensor.detach() for tensor in tensors]


def same(one: Trainer, other: Trainer) -> None:
    for got, expected in zip(weights(one), weights(other), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("model", telling(MODELS, ["mlp"]))
def test_a_replayed_step_is_the_step(
    model: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer(data, model=model, skip=False, cuda_graph=False)
    plain.fit()
    stand = Stand(monkeypatch)
    graphed = trainer(data, model=model, skip=False)
    summary = graphed.fit()
    # Tensor learning rates are float32: so are those of the plain run's kernels in the end.
    for got, expected in zip(weights(graphed), weights(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert stand.captured == graphed._stepping.graph.captures == 1
    # The first epoch's first steps, and each epoch's last, which is smaller, are ordinary.
    assert stand.replayed == 2 * 9 - ORDINARY
    assert summary["cuda_graph"] == "captured"


def test_skipping_linear_chains_is_capture_safe(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    stand = Stand(monkeypatch)
    graphed = trainer(data, skip=True)
    graphed.fit()
    assert stand.replayed == 2 * 9 - ORDINARY


KINDS: list[dict[str, Any]] = [
    {"density": None},
    {"density": None, "penalty": 0.1, "penalty_per_example": True},
    {"density": None, "layer_density": {"fc1": 0.5, "fc2": 0.3}, "dual": "augmented"},
    {"measure": "params", "dual": "pi", "dual_first": True},
    {"measure": "macs", "gates": "output"},
    {"restarts": False, "schedule": "constant", "target_schedule": "constant"},
    {"gates": "weight", "dual": "equality", "target_warmup": 0.3},
    {"settle": 0.5, "gate_lr": 0.1},
    {"start": 0.25},
    {"augment": "crop-flip"},
]
"""Settings of a run, one for each thing that a step does."""


@pytest.mark.parametrize("changes", thinned(KINDS, 2), ids=str)
def test_a_captured_run_is_the_ordinary_one(
    changes: dict[str, Any], data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch)
    runs: list[Trainer] = []
    for captures in (True, False):
        one = trainer(data, skip=False, **changes)
        if not captures:
            one._stepping.graph._ordinary = -(10**6)
            monkeypatch.setattr(one._stepping.graph, "renew", lambda: None)
        one.fit()
        runs.append(one)
    assert stand.captured == 1 + ("settle" in changes) + ("start" in changes)
    assert stand.replayed == 2 * 9 - ORDINARY * stand.captured
    same(*runs)


def test_what_counts_on_the_host_is_not_captured(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch)
    one = trainer(data, method="magnitude", skip=False)
    summary = one.fit()
    assert summary["cuda_graph"] == "MagnitudePruning counts its steps on the host"
    assert stand.captured == 0
    assert summary["expected_density"] <= 0.4
    # One who captures a step of their own is told.
    term: Any = one.term
    term._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^MagnitudePruning: step\(\) counts steps on the host"):
        term.step()


def test_a_step_that_reads_is_found(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the checks: a step that waits for the device does not pass."""
    Stand(monkeypatch)
    graphed = trainer(data, skip=False)
    term: Any = graphed.term
    advance = term.advance_

    def reading() -> None:
        advance()
        term.target.fill_(float(term.multiplier.sum().item() * 0 + 0.4))

    term.advance_ = reading
    with pytest.raises(AssertionError, match="_local_scalar_dense"):
        graphed.fit()


def test_an_interrupted_run_ends_the_same(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Stand(monkeypatch)
    whole = trainer(data, skip=False)
    whole.fit()

    class StopError(Exception):
        pass

    def stop(_: Any) -> None:
        raise StopError("after an epoch")

    first = trainer(data, tmp_path / "run", skip=False)
    with pytest.raises(StopError, match="after an epoch"):
        first.fit(on_epoch=stop)
    second = trainer(data, tmp_path / "run", skip=False)
    second.fit(resume=True)
    same(second, whole)
    assert second._stepping.graph.captures == 1


def test_learning_rates_reach_a_graph_in_place(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    Stand(monkeypatch)
    graphed = trainer(data, skip=False)
    with graphed._stepping.graph.running():
        held = [group["lr"] for group in graphed.optimizer.param_groups]
        cuda_graph.set_learning_rates(graphed.optimizer, [0.5, 0.25])
    assert [group["lr"] for group in graphed.optimizer.param_groups] == held
    assert [float(lr) for lr in held] == [0.5, 0.25]


@pytest.mark.parametrize("what", ["parameters", "state"])
def test_what_was_replaced_is_captured_again(
    what: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand = Stand(monkeypatch)
    graphed = trainer(data, skip=False)
    index = torch.arange(BATCH)

    def steps(count: int) -> None:
        with graphed._stepping.graph.running():
            for _ in range(count):
                graphed._stepping.graph(index)

    steps(ORDINARY + 2)
    steps(2)
    assert stand.captured == 1
    if what == "state":
        graphed.optimizer.load_state_dict(graphed.optimizer.state_dict())
    else:
        parameter = next(graphed.model.parameters())
        parameter.data = parameter.detach().clone()
    steps(ORDINARY)
    assert stand.captured == 1
    steps(1)
    assert stand.captured == 2


@pytest.mark.parametrize("model", telling(MODELS, ["mlp"]))
def test_a_model_that_shrinks_is_captured_again(
    model: str, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph outlives the parameters that it was captured with, and the run is the plain one."""
    monkeypatch.setattr(shrink, "SELDOM", 0.4)
    changes: dict[str, Any] = {"shrink": 1, "epochs": 6, "gate_lr": 0.2, "density": 0.3}
    plain = trainer(data, model=model, skip=False, cuda_graph=False, **changes)
    plain.fit()
    stand = Stand(monkeypatch)
    graphed = trainer(data, model=model, skip=False, **changes)
    sizes: list[int] = []
    held: list[bool] = []
    replay = stand.capture

    def capture(step: Callable[[], None], stream: Any) -> Callable[[], None]:
        sizes.append(sum(p.numel() for p in graphed.model.parameters()))
        inner, size = replay(step, stream), sizes[-1]

        def checked() -> None:
            held.append(size == sum(p.numel() for p in graphed.model.parameters()))
            inner()

        return checked

    monkeypatch.setattr(cuda_graph, "_capture", capture)
    graphed.fit()
    assert all(held)
    assert sizes == sorted(set(sizes), reverse=True)  # once for each size
    assert len(sizes) > 1
    for got, expected in zip(weights(graphed), weights(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_failing_capture_goes_on_as_ever(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer(data, skip=False)
    plain.fit()
    stand = Stand(monkeypatch, fail=True)
    graphed = trainer(data, skip=False)
    summary = graphed.fit()
    assert stand.captured == 1
    assert summary["cuda_graph"] == "operation not permitted when stream is capturing"
    for got, expected in zip(weights(graphed), weights(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class Generator:
    """What a generator of PyTorch 2.11 is on a GPU after a capture that failed."""

    def __init__(self, offset: int = 8) -> None:
        self.offset, self.stuck = offset, True

    def draw(self) -> None:
        if self.stuck:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.offset += 4

    def get_state(self) -> int:
        return self.offset

    def set_state(self, offset: int) -> None:
        self.offset = offset

    def clone_state(self) -> int:
        return self.offset

    def graphsafe_set_state(self, offset: int) -> None:
        self.offset, self.stuck = offset, False


@pytest.mark.parametrize("stuck", [True, False])
def test_noise_goes_on_after_a_failing_capture(stuck: bool) -> None:
    generator = Generator()
    generator.stuck = stuck
    cuda_graph.release_(generator, generator.draw)
    assert generator.offset == 8
    generator.draw()
    assert generator.offset == 12


def test_a_failing_capture_that_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Stand(monkeypatch, fail=True)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    steps = Steps(lambda index: None, model, optimizer, 4, asked=True)
    index = torch.arange(4)
    with steps.running():
        for _ in range(ORDINARY):
            steps(index)
        with pytest.raises(ValueError, match=r"cuda_graph: got True; expected 'auto' or False \("):
            steps(index)


def test_where_there_is_no_graph(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    made = build("mlp", (1, 8, 8), 10, (12,))
    assert cuda_graph.why_not(made, cpu) == "the model is on the device 'cpu'"
    gpu = torch.device("cuda")
    assert cuda_graph.why_not(made, gpu) is None
    monkeypatch.setattr(attach, "_on_gpu", lambda model: True)
    x = torch.randn(2, 1, 8, 8)
    l0fast.sparsify_(made, example_inputs=x, skip=True)
    assert cuda_graph.why_not(made, gpu) is None
    lenet = build("lenet5", (1, 8, 8), 10, MODELS["lenet5"])
    l0fast.sparsify_(lenet, example_inputs=x, skip=True)
    assert "read" in (cuda_graph.why_not(lenet, gpu) or "")


def test_the_trainer_says_why_and_refuses_what_cannot_be(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trainer(data)._stepping.graph.status == "the model is on the device 'cpu'"
    assert trainer(data, cuda_graph=False)._stepping.graph.status == "cuda_graph=False"
    with pytest.MonkeyPatch.context() as patch:
        Stand(patch)
        assert trainer(data, skip=False)._stepping.graph.status == "too few whole batches"
    model = build("mlp", (1, 8, 8), 10, (12,))
    settings = dataclasses.replace(SETTINGS, cuda_graph=True)
    with pytest.raises(ValueError, match="cuda_graph: got True; expected 'auto' or False on the"):
        Trainer(model, data, settings, device="cpu")
    monkeypatch.setattr(trainers, "usable_device", lambda device: torch.device("cuda"))
    streamed = data._replace(train=DataLoader(TensorDataset(*data.train), 8))
    fp16 = dataclasses.replace(settings, precision="fp16")
    for given, asked, why in (
        (streamed, settings, "batches are streamed"),
        (data, fp16, "fp16 scales its loss step by step"),
    ):
        with pytest.raises(ValueError, match=rf"cuda_graph: got True; expected .* \({why}\)$"):
            Trainer(model, given, asked)
    assert not list(gated_layers(model))  # nothing was changed
    with pytest.raises(ValueError, match="cuda_graph: got 'yes'; expected 'auto', True or False"):
        dataclasses.replace(SETTINGS, cuda_graph="yes")


@pytest.mark.gpu
@pytest.mark.unpoisoned  # filling memory would be captured too, and some ops refuse
@pytest.mark.parametrize("skip", [False, True])
def test_graphed_and_ordinary_training_are_equal_on_the_chip(data: Data, skip: bool) -> None:
    runs: list[Trainer] = []
    for capture in (True, False):
        one = trainer(data, device="cuda", skip=skip, cuda_graph=True)
        if not capture:
            one._stepping.graph._ordinary = -(10**6)  # never: the same stream and kinds of tensors
        one.fit()
        runs.append(one)
    assert [one._stepping.graph.captures for one in runs] == [1, 0]
    same(*runs)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_each_replay_draws_fresh_gates_on_the_chip(data: Data) -> None:
    one = trainer(data, device="cuda", cuda_graph=True)
    index = torch.arange(BATCH, device="cuda")
    layer: Any = one.model.get_submodule("fc1")
    drawn: list[Tensor] = []
    with one._stepping.graph.running():
        for step in range(ORDINARY + 4):
            one._stepping.graph(index)
            if step >= ORDINARY:
                drawn.append(of_latest(layer).detach().clone())
    assert len({tuple(z.tolist()) for z in drawn}) == len(drawn)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_a_capture_that_fails_on_the_chip_trains_on(data: Data) -> None:
    """What cannot be captured is a read by the host; noise is drawn after it as before."""
    runs: list[Trainer] = []
    for fails in (True, False):
        one = trainer(data, device="cuda", skip=False)
        inner = one._stepping.graph._step

        def step(index: Tensor, one: Trainer = one, inner: Any = inner) -> None:
            inner(index)
            if torch.cuda.is_current_stream_capturing():
                one._stepping._loss_sum.item()

        if fails:
            one._stepping.graph._step = step
        else:
            one._stepping.graph._ordinary = -(10**6)
        one.fit()
        runs.append(one)
    assert runs[0]._stepping.graph.captures == 0
    assert runs[0]._stepping.graph.failure
    same(*runs)


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize(
    "changes", [{"model": "lenet5"}, *KINDS[1:], {"method": "magnitude"}], ids=str
)
def test_every_kind_of_training_on_the_chip(changes: dict[str, Any], data: Data) -> None:
    runs: list[Trainer] = []
    for capture in (True, False):
        one = trainer(data, device="cuda", skip=False, **changes)
        if not capture:
            one._stepping.graph._ordinary = -(10**6)
        one.fit()
        runs.append(one)
    captured = 0 if "method" in changes else 1 + (changes.get("settle", 0) > 0)
    assert [one._stepping.graph.captures for one in runs] == [captured, 0]
    same(*runs)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_a_model_that_shrinks_frees_the_graph_of_before_on_the_chip(
    data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shrink, "SELDOM", 0.4)
    changes: dict[str, Any] = {"shrink": 1, "epochs": 6, "gate_lr": 0.2, "density": 0.3}
    one = trainer(data, device="cuda", skip=False, **changes)
    used: list[int] = []

    def measure(_: Any) -> None:
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_reserved())

    one.fit(on_epoch=measure)
    assert one._stepping.graph.captures > 1
    assert max(used[1:]) <= 2 * used[0]
