"""How a step computes: precision, parts of a batch, clipping, warm-up, averages, compiled forwards;
each under the constraint, and resumed bit for bit."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import Trainer, TrainerSettings, prune
from l0fast.data.sets import Data, Split
from l0fast.layers.handle import gated_layers
from l0fast.training.average import Average
from l0fast.training.checkpoint import CHECKPOINT, Checkpoint
from l0fast.training.stepping import parts_of
from tests.helpers.runs import evaluate, quick, small_mlp
from tests.helpers.same_run import Stop, assert_same_run, state

pytestmark = pytest.mark.usefixtures("one_thread")


class Normed(nn.Module):
    """A convolution behind whose batch norm a Linear reads each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.fc1 = nn.Linear(6 * 4, 16)
        self.fc2 = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.norm(self.conv(x))), 4)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def few(digits: Data) -> Data:
    """Three whole batches and a smaller one."""

    def some(split: Split, count: int) -> Split:
        return Split(split.inputs[:count], split.targets[:count])

    return Data(some(digits.train, 330), digits.validation, some(digits.test, 100), 10)


def trainer(few: Data, out: Path | None = None, model: Any = small_mlp, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {"density": 0.5, "epochs": 4, "batch_size": 100, "skip": False}
    return Trainer(model(), few, quick(**chosen | changes), out=out, device="cpu")


def weights(one: Trainer) -> Tensor:
    return nn.utils.parameters_to_vector(one.model.parameters()).detach()


# torch.compile looks at the draw's tensors, and hides this warning only where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "accumulate": 3, "ema": 0.8, "warmup": 0.5, "clip_grad_norm": 0.5},
        pytest.param(
            {
                "precision": "fp16",
                "ema": 0.9,
                "select": "best",
                "dual": "augmented",
                "clip_grad_norm": 1,
            },
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            {"compile": "aot_eager", "batch_size": 110, "ema": 0.5}, marks=pytest.mark.exhaustive
        ),
    ],
    ids=str,
)
def test_resumed_bit_for_bit(changes: Any, few: Data, tmp_path: Path) -> None:
    model = small_mlp if "compile" in changes else Normed
    whole = trainer(few, tmp_path / "whole", model, **changes)
    summary = whole.fit()
    assert summary["feasible"] is True
    assert whole.history[-1]["loss"] < whole.history[0]["loss"]

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise Stop("stopped")

    with pytest.raises(Stop, match="stopped"):
        trainer(few, tmp_path / "out", model, **changes).fit(on_epoch=stop)
    torch.manual_seed(99)
    again = trainer(few, tmp_path / "out", model, **changes)
    again.fit(resume=True)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


# torch.compile looks at the draw's tensors, and hides this warning only where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_each_stage_and_each_shape_has_compiled_code(few: Data) -> None:
    """PyTorch's limit, here 2, does not hold for the codes of three stages."""
    torch._dynamo.reset()
    codes: list[Any] = []
    compiling = torch.compiler.is_compiling
    backend = "l0fast_counted"
    torch._dynamo.register_backend(lambda graph, _: codes.append(graph) or graph, name=backend)  # type: ignore[func-returns-value]
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    settings = quick(density=0.5, epochs=4, batch_size=110, skip=False, compile=backend)
    one = Trainer(model, few, settings, device="cpu")
    uncompiled: list[bool] = []
    model[1].register_forward_pre_hook(
        lambda layer, _: None if compiling() else uncompiled.append(layer.training)
    )
    with torch._dynamo.config.patch(recompile_limit=2):
        one.fit()
    assert len(codes) == 3
    assert uncompiled
    assert not any(uncompiled)  # evaluation alone


def test_parts_of_a_batch_are_the_batch(few: Data) -> None:
    """All gates are open: the gradients' mean over the examples is that of the whole batch, and the
    multipliers take one step."""
    changes: dict[str, Any] = {"epochs": 1, "start": 0.9, "settle": 0, "density": 0.5}
    plain, parts = trainer(few, **changes), trainer(few, accumulate=7, **changes)
    sizes: list[int] = []
    parts.model.register_forward_pre_hook(
        lambda model, inputs: sizes.append(len(inputs[0])) if model.training else None
    )
    plain.fit()
    parts.fit()
    torch.testing.assert_close(weights(parts), weights(plain), rtol=1e-4, atol=1e-6)
    assert parts.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=1e-5)
    assert parts.history[0]["train_error_percent"] == plain.history[0]["train_error_percent"]
    assert sorted(sizes[:7]) == [14, 14, 14, 14, 14, 15, 15]
    assert len(sizes) == 4 * 7
    for size, asked, wanted in ((3, 7, [1, 1, 1]), (10, 3, [3, 3, 4])):
        batch = {"x": torch.arange(size), "name": "a", "scale": torch.ones(())}
        found = list(parts_of(batch, asked))
        assert [len(part["x"]) for part, _ in found] == wanted
        assert torch.equal(torch.cat([part["x"] for part, _ in found]), batch["x"])  # type: ignore[arg-type]
        assert [last for _, last in found] == [False] * (len(wanted) - 1) + [True]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_dual_takes_one_step_of_the_optimizers(few: Data, accumulate: int) -> None:
    changes: dict[str, Any] = {"epochs": 2, "start": 0, "settle": 0, "target_schedule": "linear"}
    one = trainer(few, accumulate=accumulate, **changes)
    taken: list[int] = []
    advance, value = one.term.advance_, one.term.value  # type: ignore[union-attr]
    one.term.advance_ = lambda: (taken.append(1), advance())[1]  # type: ignore[union-attr, method-assign]
    one.term.value = lambda: (taken.append(0), value())[1]  # type: ignore[union-attr, method-assign]
    one.optimizer.register_step_post_hook(lambda *_: taken.append(2))
    one.fit()
    assert taken == [0, 2, 1] * 8
    assert float(one.term.taken) == 8  # type: ignore[union-attr, arg-type]


def test_a_skipped_step_moves_the_multipliers_all_the_same(few: Data, tmp_path: Path) -> None:
    one = trainer(few, tmp_path, precision="fp16", epochs=2, start=0, settle=0)
    scaler = one.state.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**127, "growth_interval": 3})
    before = weights(one).clone()
    moved: list[tuple[bool, float]] = []

    def see(*_: Any) -> None:
        moved.append((torch.equal(weights(one), before), float(one.term.multiplier)))  # type: ignore[union-attr, arg-type]

    advance = one.term.advance_  # type: ignore[union-attr]
    one.term.advance_ = lambda: (advance(), see())[0]  # type: ignore[union-attr, method-assign]
    one.fit()
    skipped = [row["skipped_steps"] for row in one.history]
    assert skipped[0] == 4
    assert all(still for still, _ in moved[:4])
    assert [multiplier for _, multiplier in moved[:4]] == sorted({m for _, m in moved[:4]})
    saved = state(tmp_path)["scaler"]
    assert saved["scale"] == 2.0 ** (127 - sum(skipped))
    assert saved["growth_interval"] == 3


def test_precisions_agree(few: Data) -> None:
    """The same training to rounding, with products in the type that was asked for."""
    seen: dict[str, set[torch.dtype]] = {}
    found: dict[str, Trainer] = {}
    for name in ("fp32", "bf16", "fp16"):
        one = found[name] = trainer(few, precision=name, epochs=3)
        kinds = seen[name] = set()
        one.model.fc1.register_forward_hook(  # type: ignore[union-attr]
            lambda layer, _x, y, kinds=kinds: kinds.add(y.dtype) if layer.training else None
        )
        one.fit()
        assert all(p.dtype == torch.float32 for p in one.model.parameters())
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert seen == {name: {kind} for name, kind in kinds.items()}
    for name, tolerance in (("bf16", 0.1), ("fp16", 0.02)):
        losses = [one.history[-1]["loss"] for one in (found[name], found["fp32"])]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        assert losses[0] != losses[1]


def test_only_the_weights_are_clipped(few: Data) -> None:
    one = trainer(few, clip_grad_norm=0.01, epochs=1, start=0, settle=0)
    norms: list[tuple[float, float]] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = [[p.grad.norm() for p in g["params"]] for g in optimizer.param_groups]
        norms.append(tuple(float(torch.stack(group).norm()) for group in groups))  # type: ignore[arg-type]

    one.optimizer.register_step_pre_hook(keep)
    one.fit()
    assert all(weights == pytest.approx(0.01, rel=1e-3) for weights, _ in norms)
    plain = trainer(few, epochs=1, start=0, settle=0)
    plain.optimizer.register_step_pre_hook(keep)
    plain.fit()
    assert norms[0][1] == norms[4][1]  # of the gates, in the first step of both
    assert norms[4][0] > 0.1


def test_the_learning_rate_rises(few: Data) -> None:
    one = trainer(few, warmup=1.5, epochs=4, schedule="cosine")
    seen: list[list[float]] = []
    one.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    one.fit()
    wanted = [(step + 1) / 6 for step in range(6)]
    wanted += [0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert [lr for lr, _ in seen] == pytest.approx([5e-3 * factor for factor in wanted])
    assert {lr for _, lr in seen} == {0.05}


def test_the_average_is_evaluated_and_pruned(few: Data, tmp_path: Path) -> None:
    """Weights and the statistics of batch norms are averaged after each step; the gates are the
    model's own; the model that goes on training is not touched."""
    one = trainer(few, tmp_path, Normed, ema=0.7)
    gates = [layer.log_alpha for layer in gated_layers(one.model).values()]
    expected: dict[str, Any] = {}
    update = one.state.average.update  # type: ignore[union-attr]

    def follow() -> None:
        for name, value in one.model.state_dict().items():
            if value.is_floating_point() and "log_alpha" not in name:
                old = expected.get(name, value.double())
                expected[name] = 0.7 * old + value.double() * 0.3
        update()

    one.state.average.update = follow  # type: ignore[union-attr, method-assign]
    summary = one.fit()
    assert {"norm.running_mean", "norm.running_var", "conv.weight", "fc2.bias"} <= expected.keys()
    saved = state(tmp_path)
    assert saved["average"].keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved["average"][name].double(), value, rtol=1e-4, atol=1e-6)
    twin = copy.deepcopy(one.model)
    twin.load_state_dict(saved["model"] | saved["average"])
    assert not torch.equal(twin.fc1.weight, one.model.fc1.weight)  # type: ignore[union-attr, arg-type]
    for layer, gate in zip(gated_layers(twin).values(), gates, strict=True):
        assert torch.equal(layer.log_alpha, gate)
    x, y = few.test
    with torch.no_grad():
        wrong = int((twin.eval()(x).argmax(1) != y).sum())
        small = prune(twin, x[:1], one.term).eval()  # type: ignore[arg-type]
        torch.testing.assert_close(one.pruned.eval()(x), small(x))  # type: ignore[union-attr]
    assert one.history[-1]["test_error_percent"] == 100 * wrong / len(y)
    assert summary["feasible"] is True
    before = weights(one).clone()
    with Average(one.model, 0.5).in_force():  # before its first step: the model itself
        assert torch.equal(weights(one), before)


def test_a_mask_is_not_averaged() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    average = Average(model, 0.9)
    for _ in range(3):
        average.update()
    assert torch.equal(average.state_dict()["mask"], torch.tensor([0.0, -torch.inf]))


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_dense_run_has_the_average_everywhere(few: Data, tmp_path: Path, select: str) -> None:
    """Metrics of both splits, summary and checkpoint; the model itself goes on from its weights."""
    dense: dict[str, Any] = {"density": None, "ema": 0.9, "epochs": 2, "select": select}
    one = trainer(few, tmp_path, Normed, **dense)
    summary = one.fit()
    plain = trainer(few, None, Normed, **dense | {"ema": None})
    plain.fit()
    assert torch.equal(weights(one), weights(plain))
    read = Checkpoint.read(tmp_path / CHECKPOINT, torch.device("cpu"))
    epoch, saved = read.selected
    assert epoch == summary["selected_epoch"]
    twin = Normed()
    twin.load_state_dict(saved)
    row = one.history[epoch - 1]
    assert evaluate(twin, few.test) == pytest.approx(row["test_error_percent"])
    assert evaluate(twin, few.validation) == pytest.approx(row["validation_error_percent"])
    assert summary["test_error_percent"] == row["test_error_percent"]
    if epoch == one.epoch:
        with one.state.evaluated():
            assert torch.equal(twin.fc1.weight, one.model.fc1.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.equal(twin.fc1.weight, one.model.fc1.weight)  # type: ignore[union-attr, arg-type]


def test_the_selected_model_has_the_average_under_every_name(few: Data) -> None:
    """Tied weights have two names in a state; a buffer that is not saved has none."""
    tied, other, mean = (torch.full((2,), float(value)) for value in range(3))
    state = {"first": tied, "second": tied, "other": other}
    one = trainer(few, ema=0.5).checkpoint()
    found = replace(one, model=state, average={"first": mean, "unsaved": other}).selected
    assert found[0] == 0
    assert found[1] == {"first": mean, "second": mean, "other": other}


def test_what_cannot_be_is_refused(few: Data, tmp_path: Path) -> None:
    for changes, message in (
        ({"precision": "fp8"}, "precision: got 'fp8'; expected one of 'fp32', 'bf16', 'fp16'"),
        ({"accumulate": 0}, "accumulate: got 0; expected a whole number >= 1"),
        ({"warmup": 20.0}, "warmup: got 20.0; expected a number of epochs >= 0, less than all"),
        ({"ema": 1.0}, "ema: got 1.0; expected a decay in [0, 1), or None"),
        ({"clip_grad_norm": 0}, "clip_grad_norm: got 0; expected a number > 0, or None"),
        ({"shrink": 1, "density": 0.5, "ema": 0.9}, "shrink: got 1; expected no ema: it needs"),
    ):
        with pytest.raises(ValueError, match="expected") as caught:
            TrainerSettings(**changes)  # type: ignore[arg-type]
        assert str(caught.value).startswith(message)
    model = small_mlp()
    with pytest.raises(ValueError, match=r"^compile: got 'fast'; expected a backend of torch.comp"):
        Trainer(model, few, quick(density=0.5, compile="fast"), device="cpu")
    assert not gated_layers(model)  # it was not changed
    trainer(few, tmp_path, precision="fp16", ema=0.5, epochs=1).fit()
    content = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert content["average"].keys() >= {"fc1.weight"}
    with pytest.raises(ValueError, match=r"^ema: got None; expected 0.5, as in the checkpoint"):
        trainer(few, tmp_path, precision="fp16", epochs=1).fit(resume=True)
