"""The trainer: what it reaches, what it writes, and what it refuses."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import (
    AugmentedLagrangian,
    DualAscent,
    L0Penalty,
    PIControl,
    TargetSchedule,
    Trainer,
    TrainerSettings,
    _digest,
    load_pruned,
    prune,
)
from l0fast.constraints.constraint import DensityConstraint
from l0fast.data.sets import Data, Split
from l0fast.layers.handle import gated_layers
from l0fast.training import models
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import FILES, METRICS, PLOT, PRUNED, SUMMARY
from l0fast.training.tensorboard import TENSORBOARD
from tests.helpers.counting import Counting
from tests.helpers.plain_models import LinearStream
from tests.helpers.runs import evaluate, quick, small_mlp, trainer
from tests.helpers.thinned import telling, thinned

pytestmark = pytest.mark.usefixtures("one_thread")


METRICS_OF = {
    "always": {
        "epoch", "loss", "train_error_percent", "validation_error_percent", "test_error_percent",
    },
    "gated": {"expected_density", "realised_density", "layers", "collapsed", "settled"},
    "constrained": {"density", "aim", "lambda", "restarts", "measure", "feasible", "stalls"},
}  # fmt: skip
SUMMARY_OF = {
    "always": {
        "dataset", "model", "seed", "epochs", "target_density", "target_layer_density", "penalty",
        "measure", "method",
        "expected_density", "architecture", "test_error_percent", "best_test_error_percent",
        "validation_error_percent", "selected_epoch", "feasible", "params", "dense_params",
        "stalls", "params_fraction", "macs", "dense_macs", "macs_fraction", "seconds", "settings",
        "device", "torch", "cuda_graph", "metric",
    },
    "gated": {
        "realised_density", "forced", "collapsed", "reopened",
        "memory", "dense_memory", "memory_fraction",
    },
    "constrained": set[str](),
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "density": ({"density": 0.5}, ("always", "gated", "constrained")),
    "params": ({"density": 0.4, "measure": "params"}, ("always", "gated", "constrained")),
    "layers": (
        {"layer_density": {"fc2": 0.5, "fc1": 0.6, "fc3": 0.8}},
        ("always", "gated", "constrained"),
    ),
    "penalty": ({"penalty": 0.5}, ("always", "gated")),
    "dense": ({}, ("always",)),
}


@pytest.fixture(scope="module", params=KINDS)
def finished(
    request: pytest.FixtureRequest, digits: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Trainer, dict[str, Any], Path]:
    """A finished run of each kind."""
    kind = request.param
    out = tmp_path_factory.mktemp(kind) / "run"
    one = trainer(digits, out, **KINDS[kind][0])
    return kind, one, one.fit(), out


# --- what it reaches and writes ------------------------------------------------------------------


def test_it_reaches_its_targets(finished: Any) -> None:
    kind, one, summary, _ = finished
    last = one.history[-1]
    assert summary["test_error_percent"] < 30
    assert last["loss"] < one.history[0]["loss"] / 2
    if kind == "dense":
        assert summary["params_fraction"] == summary["macs_fraction"] == 1
        return
    if kind == "penalty":
        assert last["expected_density"] < one.history[0]["expected_density"] - 0.02
        assert summary["feasible"] is None
        return
    # The expected density comes close in three quarters, and the pruned model is never over.
    late = one.history[3 * len(one.history) // 4 - 1]
    assert abs(late["expected_density"] - last["expected_density"]) < 0.06
    assert summary["feasible"] is True
    report = one.pruned.report
    if kind == "params":
        assert last["density"]["model"] == pytest.approx(0.4, abs=0.03)
        assert 0.3 < summary["params_fraction"] <= 0.4
        assert list(report.groups) == ["model (params)"]
        assert report.groups["model (params)"]["density"] == summary["params_fraction"]
        return
    targets = {"model": 0.5} if kind == "density" else KINDS["layers"][0]["layer_density"]
    assert {name: group["target"] for name, group in report.groups.items()} == targets
    for group in report.groups.values():
        assert group["density"] <= group["target"]
    if kind == "density":
        assert last["expected_density"] == pytest.approx(0.5, abs=0.03)
        assert 0.4 < summary["realised_density"] <= 0.5
    else:
        for name, target in targets.items():
            assert last["layers"][name]["expected_density"] == pytest.approx(target, abs=0.06)
    assert summary["params_fraction"] < 0.75
    assert sum(p.numel() for p in one.pruned.parameters()) == summary["params"]


def test_the_pruned_model_is_the_gated_one(finished: Any, digits: Data) -> None:
    kind, one, summary, out = finished
    last = one.history[-1]
    assert last["test_error_percent"] == evaluate(one.model, digits.test)
    assert digits.validation is not None
    assert last["validation_error_percent"] == evaluate(one.model, digits.validation)
    assert summary["best_test_error_percent"] == min(r["test_error_percent"] for r in one.history)
    if kind == "dense":
        assert one.pruned is None
        assert summary["test_error_percent"] == last["test_error_percent"]
        return
    assert summary["test_error_percent"] == evaluate(one.pruned, digits.test)
    whole = prune(one.model, one.example_inputs, target=1.0)  # no gate is forced closed
    assert evaluate(whole, digits.test) == last["test_error_percent"]
    with torch.no_grad():
        torch.testing.assert_close(
            whole.eval()(digits.test.inputs), one.model.eval()(digits.test.inputs)
        )
    if summary["forced"] == 0:
        assert summary["test_error_percent"] == last["test_error_percent"]
    loaded = load_pruned(small_mlp, out / PRUNED)
    assert evaluate(loaded, digits.test) == summary["test_error_percent"]
    assert not any("l0fast" in type(module).__module__ for module in one.pruned.modules())


def test_metrics(finished: Any) -> None:
    kind, one, _, out = finished
    wanted = set[str]().union(*(METRICS_OF[part] for part in KINDS[kind][1]))
    rows = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    assert rows == one.history
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    sizes = {"fc1": 64, "fc2": 32, "fc3": 16}
    for row in rows:
        assert row.keys() == wanted
        others = {"epoch", "layers", "collapsed", "settled"} | METRICS_OF["constrained"]
        for name in wanted - others:
            assert isinstance(row[name], float), name
            assert math.isfinite(row[name])
        if "layers" in row:
            assert {name: layer["of"] for name, layer in row["layers"].items()} == sizes
            for layer in row["layers"].values():
                assert layer.keys() == {"kept", "of", "expected_density"}
                assert 0 <= layer["kept"] <= layer["of"]
        if "lambda" in row:
            names = sizes.keys() if kind == "layers" else {"model"}
            assert row["measure"] == ("params" if kind == "params" else "gates")
            for key in METRICS_OF["constrained"] - {"measure", "feasible", "stalls"}:
                assert row[key].keys() == names
            if kind == "density":
                assert row["density"]["model"] == pytest.approx(row["expected_density"], rel=1e-6)
            elif kind == "layers":
                for name, layer in row["layers"].items():
                    density = layer["expected_density"]
                    assert row["density"][name] == pytest.approx(density, rel=1e-6)
            assert all(isinstance(count, int) for count in row["restarts"].values())


def test_a_collapse_is_told(digits: Data) -> None:
    """The multiplier outruns the weights: a layer has no open gate left, and the run says which."""
    one = trainer(digits, density=0.1, epochs=3, dual_lr=30.0, restarts=False, settle=0)
    summary = one.fit()
    assert summary["feasible"] is True  # it speaks of size alone
    assert summary["collapsed"]
    small: Any = one.pruned
    assert summary["collapsed"] == small.report.collapsed
    for row in one.history:
        closed = [name for name, layer in row["layers"].items() if layer["kept"] == 0]
        assert row["collapsed"] == closed
    assert one.history[-1]["collapsed"] == summary["collapsed"]


def test_summary(finished: Any) -> None:
    kind, one, summary, out = finished
    wanted = set[str]().union(*(SUMMARY_OF[part] for part in KINDS[kind][1]))
    saved = json.loads((out / SUMMARY).read_text())
    assert saved.pop("sha256")
    assert saved == summary
    assert summary.keys() == wanted
    assert (summary["dataset"], summary["model"]) == ("digits", "mlp")
    assert (summary["seed"], summary["epochs"]) == (0, 12)
    options = KINDS[kind][0]
    assert summary["target_density"] == options.get("density")
    assert summary["target_layer_density"] == options.get("layer_density")
    assert summary["penalty"] == options.get("penalty")
    assert summary["measure"] == options.get("measure", "gates")
    assert summary["dense_params"] == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert summary["dense_macs"] == 64 * 32 + 32 * 16 + 16 * 10
    assert summary["params_fraction"] == summary["params"] / summary["dense_params"]
    assert summary["macs_fraction"] == summary["macs"] / summary["dense_macs"]
    assert summary["expected_density"] == one.history[-1].get("expected_density")
    assert 0 < summary["seconds"] < 600
    if kind != "dense":
        a, b, c = (int(width) for width in summary["architecture"].split("-"))
        assert summary["params"] == a * b + b + b * c + c + c * 10 + 10
        assert summary["macs"] == a * b + b * c + c * 10


def test_files(finished: Any) -> None:
    kind, _, _, out = finished
    wanted = set(FILES) - ({PRUNED} if kind == "dense" else set())
    assert {path.name for path in out.iterdir()} - {TENSORBOARD} == wanted
    assert (out / PLOT).read_bytes().startswith(b"\x89PNG")


def test_without_a_folder_nothing_is_written(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    summary = trainer(digits, None, density=0.5, epochs=1).fit()
    assert summary["feasible"] is True
    assert list(tmp_path.iterdir()) == []


class Own(LinearStream):
    """A model of the user's: a branch, a layer that never runs, and no nn.Sequential."""

    def __init__(self) -> None:
        super().__init__(64, 24, 10)
        self.unused = nn.Linear(3, 3)


def test_a_model_of_the_users(digits: Data) -> None:
    """Inputs without images, no validation split."""
    torch.manual_seed(0)
    flat = Data(
        Split(digits.train.inputs.flatten(1), digits.train.targets),
        None,
        Split(digits.test.inputs.flatten(1), digits.test.targets),
        10,
    )
    one = Trainer(Own(), flat, quick(density=0.5), device="cpu")
    assert gated_layers(one.model).keys() == {"first", "second", "head"}
    rows: list[dict[str, Any]] = []
    summary = one.fit(on_epoch=rows.append)
    assert rows == one.history
    assert "validation_error_percent" not in rows[0]
    assert summary["validation_error_percent"] is None
    assert isinstance(one.pruned, Own)
    assert summary["feasible"] is True
    assert summary["test_error_percent"] < 35
    assert evaluate(one.pruned, flat.test) == summary["test_error_percent"]


# --- how it trains -------------------------------------------------------------------------------


DUAL_SETTINGS: dict[str, dict[str, Any]] = {
    f"{dual}, {schedule}": {
        "density": 0.4,
        "dual": dual,
        "target_schedule": schedule,
        "dual_first": dual == "pi",
    }
    for dual, schedule in [
        ("pi", "constant"),
        ("augmented", "cubic"),
        ("equality", "linear"),
    ]
}


@pytest.mark.parametrize("kind", thinned([*KINDS, *DUAL_SETTINGS], 4))
def test_no_step_reads_back(digits: Data, kind: str) -> None:
    """As many values come back to the host for an epoch of 3 steps as for one of 42."""
    counts: list[Counter[str]] = []
    for batch_size in (512, 32):
        settings = DUAL_SETTINGS[kind] if kind in DUAL_SETTINGS else KINDS[kind][0]
        one = trainer(digits, batch_size=batch_size, epochs=2, settle=0, **settings)
        counting = Counting()
        with contextlib.ExitStack() as stack:

            def count(row: dict[str, Any], stack: Any = stack, counting: Any = counting) -> None:
                if row["epoch"] == 1:  # Adam makes its state in the first
                    stack.enter_context(counting)
                else:
                    stack.close()

            one.fit(on_epoch=count)
        counts.append(counting.calls)
    assert [count["cross_entropy_loss"] + count["nll_loss_forward"] for count in counts] == [3, 42]
    assert counts[0]["_local_scalar_dense"] == counts[1]["_local_scalar_dense"] > 0
    assert counts[0]["_to_copy"] == counts[1]["_to_copy"]


def test_the_dual_and_the_schedule_are_those_of_the_settings(digits: Data) -> None:
    options: dict[str, Any] = {"density": 0.25, "dual_lr": None, "target_schedule": "linear"}
    one = trainer(digits, dual="pi", dual_first=True, target_warmup=0.4, **options)
    assert isinstance(one.term, DensityConstraint)
    dual = PIControl(lr=4.0, proportional=1.2, dual_first=True)  # 1 / target, 0.3 / target
    assert one.term.dual == dual
    assert one.term.schedule == TargetSchedule(math.ceil(0.4 * one.total_steps), "linear")
    two = trainer(digits, dual="augmented", **options)
    assert isinstance(two.term, DensityConstraint)
    assert two.term.dual == AugmentedLagrangian(lr=4.0, penalty=1.2)
    options = {"density": 0.25, "dual_lr": 0.2, "target_schedule": "constant"}
    three = trainer(digits, restarts=False, **options)
    assert isinstance(three.term, DensityConstraint)
    assert three.term.schedule is None
    assert three.term.dual == DualAscent(0.2, restarts=False)


def test_the_rules_for_the_multiplier(digits: Data) -> None:
    assert TrainerSettings().target_schedule == "cubic"
    one = trainer(digits, dual_lr=None, epochs=10, density=0.25, target_schedule="cubic")
    assert isinstance(one.term, DensityConstraint)
    assert one.term.schedule == TargetSchedule(math.ceil(0.45 * one.total_steps), "cubic")
    assert float(one.term.dual_lr) == 4.0
    constant: dict[str, Any] = {"dual_lr": None, "target_schedule": "constant"}
    two = trainer(digits, epochs=10, density=0.9, **constant)
    assert isinstance(two.term, DensityConstraint)
    assert two.term.schedule is None
    rate = 33 / (0.9 * two.total_steps)
    assert float(two.term.dual_lr) == pytest.approx(rate)
    three = trainer(digits, epochs=10, density=0.25, **constant)  # 33 / (target x steps) is 0.31
    assert isinstance(three.term, DensityConstraint)
    assert float(three.term.dual_lr) == pytest.approx(0.1)


def test_a_stall_is_told(digits: Data) -> None:
    """A multiplier that hardly grows closes nothing; its words come with the rows and the end."""
    one = trainer(digits, epochs=8, density=0.1, dual_lr=1e-4, start=0, settle=0.1)
    summary = one.fit()
    words = one.history[-2]["stalls"]["model"]
    assert one.history[-1]["stalls"] == {}  # its gates are decided by then
    assert summary["stalls"] == {"model": words}
    assert "still too small to close gates; try a larger dual learning rate (it is 0.0001)" in words
    assert not any(row["stalls"] for row in one.history[:5])


def test_each_example_once_an_epoch_in_a_new_order(digits: Data) -> None:
    one = trainer(digits, density=0.5, batch_size=100, epochs=2)
    seen: list[Tensor] = []
    one.model.register_forward_pre_hook(
        lambda model, inputs: seen.append(inputs[0]) if model.training else None
    )
    orders: list[Tensor] = []

    def keep_order(_row: Any) -> None:
        assert [len(batch) for batch in seen] == [100] * 13 + [17]
        orders.append(torch.cat(seen).flatten(1))
        seen.clear()

    one.fit(on_epoch=keep_order)
    assert not torch.equal(*orders)
    rows = [sorted(map(tuple, order.tolist())) for order in orders]
    assert rows[0] == rows[1] == sorted(map(tuple, digits.train.inputs.flatten(1).tolist()))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_learning_rates(digits: Data, schedule: str) -> None:
    one = trainer(digits, density=0.5, epochs=2, batch_size=300, schedule=schedule)
    seen: list[list[float]] = []
    one.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    one.fit()
    assert len(seen) == 2 * 5 == one.total_steps
    for step, lrs in enumerate(seen):
        factor = 0.5 * (1 + math.cos(math.pi * step / 10)) if schedule == "cosine" else 1
        assert lrs == pytest.approx([5e-3 * factor, 0.05])  # the gates' stays


def test_the_loss_is_the_mean_over_the_examples(digits: Data) -> None:
    one = trainer(digits, batch_size=500, epochs=1, lr=1e-30, weight_decay=0.0)
    with torch.no_grad():
        logits = one.model(digits.train.inputs)
        wanted = F.cross_entropy(logits, digits.train.targets)
    one.fit()
    (row,) = one.history
    assert row["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert row["train_error_percent"] == evaluate(one.model, digits.train)


def test_seeds(digits: Data) -> None:
    def weights(**settings: Any) -> Tensor:
        one = trainer(digits, density=0.5, epochs=1, **settings)
        one.fit()
        return nn.utils.parameters_to_vector(one.model.parameters()).detach()

    first = weights(seed=1)
    assert torch.equal(first, weights(seed=1))
    assert not torch.equal(first, weights(seed=2))


def test_the_penalty_in_both_units(digits: Data) -> None:
    gated = 64 * 32 + 32 * 16 + 16 * 10
    for per_example, factor in ((False, 1.0), (True, gated / len(digits.train.targets))):
        term = trainer(digits, penalty=0.3, penalty_per_example=per_example).term
        assert isinstance(term, L0Penalty)
        assert float(term.coefficient) == pytest.approx(0.3 * factor)


def test_the_order_of_layer_targets_does_not_matter(digits: Data, tmp_path: Path) -> None:
    """A checkpoint's multipliers are found again, whichever order the caller names."""
    targets = {"fc2": 0.5, "fc1": 0.7}
    first = trainer(digits, tmp_path / "run", layer_density=targets, epochs=1)
    first.fit()
    assert first.history[0]["lambda"]["fc1"] != first.history[0]["lambda"]["fc2"]
    again = trainer(
        digits, tmp_path / "run", layer_density=dict(reversed(targets.items())), epochs=1
    )
    again.open(resume=True)
    assert isinstance(again.term, DensityConstraint)
    found = dict(zip(again.term.names, again.term.multiplier.tolist(), strict=True))
    assert found == first.history[0]["lambda"]


# --- when it goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("where", telling(["loss", "weights"], ["loss"]))
def test_what_is_no_number_stops_the_run(digits: Data, tmp_path: Path, where: str) -> None:
    """NaN in the third epoch: one line; the files of the second stay, and can be resumed."""
    one = trainer(digits, tmp_path / "run", density=0.5, epochs=4)
    steps = 2 * one.steps_per_epoch + (1 if where == "loss" else one.steps_per_epoch)
    taken = itertools.count(1)

    def poison(optimizer: Any, *_: Any) -> None:
        if next(taken) == steps:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0][0, 0] = math.nan

    one.optimizer.register_step_post_hook(poison)
    files: dict[str, bytes] = {}

    def content() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}

    def keep(_row: Any) -> None:
        files.update(content())

    with pytest.raises(ValueError, match=rf"^{where} \(epoch 3\): got .*; expected") as caught:
        one.fit(on_epoch=keep)
    assert "\n" not in str(caught.value)
    assert files.keys() == {CHECKPOINT, METRICS}
    assert content() == files
    assert len(files[METRICS].splitlines()) == 2
    summary = trainer(digits, tmp_path / "run", density=0.5, epochs=4).fit(resume=True)
    assert summary["feasible"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1e-9}, "target: got 1e-09; expected a density in ["),
        ({"layer_density": {}}, "target: got {}; expected at least one layer or pattern"),
        ({"layer_density": {"fc9": 0.5}}, "target: got 'fc9'; expected a pattern that matches one"),
        ({"layer_density": {"fc1": 0.5, "f*": 0.5}}, "target: got 'fc1'; expected layers of one"),
        ({"layer_density": {"fc1": 1e-9}}, "target['fc1']: got 1e-09; expected a density in [0.0"),
    ],
)
def test_bad_targets(digits: Data, tmp_path: Path, options: Any, message: str) -> None:
    model = small_mlp()
    before = [(name, type(part)) for name, part in model.named_modules()], set(model.state_dict())
    with pytest.raises(ValueError, match="expected") as caught:
        Trainer(model, digits, quick(**options), out=tmp_path / "run", device="cpu")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()
    after = [(name, type(part)) for name, part in model.named_modules()], set(model.state_dict())
    assert after == before
    assert not any(part._forward_pre_hooks for part in model.modules())


def spoiled(digits: Data, what: str) -> Any:
    """The data with one thing wrong."""
    inputs, targets = (tensor[:40].clone() for tensor in digits.train)
    test = digits.test
    match what:
        case "lengths":
            targets = targets[:39]
        case "empty":
            inputs, targets = inputs[:0], targets[:0]
        case "dtype":
            targets = targets.float()
        case "shape":
            targets = targets[:, None]
        case "class":
            targets[3] = 10
        case "negative":
            test = Split(test.inputs, test.targets - 1)
        case "nan":
            inputs[5, 0, 3, 3] = math.nan
        case "infinity":
            test = Split(test.inputs / 0, test.targets)
        case _:
            wrong: Any = inputs.tolist(), targets
            return Data(wrong, None, test, 10)
    return Data(Split(inputs, targets), None, test, 10)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lengths", "data.train.targets: got 'torch.int64 of shape (39,)'; expected int64 and one"),
        ("empty", "data.train.targets: got 'torch.int64 of shape (0,)'; expected"),
        ("dtype", "data.train.targets: got 'torch.float32 of shape (40,)'; expected int64"),
        ("shape", "data.train.targets: got 'torch.int64 of shape (40, 1)'; expected int64"),
        ("class", "data.train.targets: got '0 to 10'; expected classes from 0 to 9"),
        ("negative", "data.test.targets: got '-1 to 8'; expected classes from 0 to 9"),
        ("nan", "data.train.inputs: got 'NaN or infinity'; expected finite numbers"),
        ("infinity", "data.test.inputs: got 'NaN or infinity'; expected finite numbers"),
        ("lists", "data.train: got"),
    ],
)
def test_bad_data(digits: Data, tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        Trainer(small_mlp(), spoiled(digits, what), TrainerSettings(), out=tmp_path / "run")
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "abc"}, ValueError, "device: got 'abc'; expected a device of this machine"),
        ({"identity": {"x": object()}}, TypeError, "identity: got {'x'"),
        ({"model": "mlp"}, TypeError, "model: got 'str'; expected a torch.nn.Module"),
    ],
)
def test_bad_arguments(digits: Data, options: Any, error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "model": small_mlp(),
        "data": digits,
        "settings": TrainerSettings(),
    } | options
    with pytest.raises(error) as caught:
        Trainer(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# --- folders and checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, TENSORBOARD])
def test_a_folder_with_a_run_is_not_overwritten(digits: Data, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match=r"^out: got .*; expected a folder without a run in it"):
        trainer(digits, tmp_path, density=0.5).fit()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "precious")]


def test_a_folder_that_cannot_be_written_is_refused_before_gates_are_put_in(
    digits: Data, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("precious")
    model = small_mlp()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"^out: got .*; expected a folder that can be writte"):
            Trainer(model, digits, quick(density=0.5), out=out, device="cpu")
    assert not gated_layers(model)
    assert (tmp_path / "file").read_text() == "precious"


def test_other_files_in_the_folder_do_not_matter(digits: Data, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    trainer(digits, tmp_path, density=0.5, epochs=1).fit()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_resume_without_a_checkpoint_starts(digits: Data, tmp_path: Path) -> None:
    summary = trainer(digits, tmp_path / "run", density=0.5, epochs=1).fit(resume=True)
    assert summary["feasible"] is True


@pytest.fixture(scope="module")
def checkpoint(digits: Data, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The checkpoint of a finished run with density=0.5, epochs=1."""
    out = tmp_path_factory.mktemp("checkpoint")
    trainer(digits, out, density=0.5, epochs=1).fit()
    return (out / CHECKPOINT).read_bytes()


def without(content: bytes, tmp_path: Path, **changes: Any) -> bytes:
    """A checkpoint with entries changed (None: left out)."""
    path = tmp_path / "changed.pt"
    path.write_bytes(content)
    state = torch.load(path, weights_only=True)
    state |= changes
    state = {key: value for key, value in state.items() if value is not None}
    with path.open("wb") as file:
        _digest.write_sealed(file, lambda to: torch.save(state, to))
    changed = path.read_bytes()
    path.unlink()
    return changed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c, _: c[: len(c) // 2], "resume: got"),
        (lambda c, _: c[:-1], "resume: got"),
        (lambda c, _: b"", "resume: got"),
        (lambda c, _: b"garbage" * 100, "resume: got"),
        (lambda c, t: without(c, t, optimizer=None), "resume: got"),
        (lambda c, t: without(c, t, identity=[1, 2]), "resume: got"),
        (
            lambda c, t: without(c, t, model={"fc1.weight": torch.zeros(3)}),
            "model.fc1.weight: got '(32, 64)'; expected shape (3,), as in the checkpoint",
        ),
    ],
    ids=["half", "cut", "empty", "garbage", "part", "identity", "model"],
)
def test_a_bad_checkpoint_is_refused_and_kept(
    digits: Data, tmp_path: Path, checkpoint: bytes, damage: Any, message: str
) -> None:
    content = damage(checkpoint, tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    (out / CHECKPOINT).write_bytes(content)
    one = trainer(digits, out, density=0.5, epochs=1)
    before = nn.utils.parameters_to_vector(one.model.parameters()).detach().clone()
    with pytest.raises(ValueError, match="expected") as caught:
        one.fit(resume=True)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert (out / CHECKPOINT).read_bytes() == content
    assert [path.name for path in out.iterdir()] == [CHECKPOINT]
    assert torch.equal(nn.utils.parameters_to_vector(one.model.parameters()), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.4}, "density: got 0.4; expected 0.5, as in the checkpoint"),
        ({"epochs": 2}, "epochs: got 2; expected 1, as in the checkpoint"),
        ({"seed": 1}, "seed: got 1; expected 0, as in the checkpoint"),
        ({"lr": 1.0}, "lr: got 1.0; expected 0.005, as in the checkpoint"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    digits: Data, tmp_path: Path, checkpoint: bytes, options: Any, message: str
) -> None:
    (tmp_path / CHECKPOINT).write_bytes(checkpoint)
    with pytest.raises(ValueError, match="as in the checkpoint") as caught:
        trainer(digits, tmp_path, **{"density": 0.5, "epochs": 1} | options).fit(resume=True)
    assert str(caught.value).startswith(message)
    assert (tmp_path / CHECKPOINT).read_bytes() == checkpoint


def test_the_checkpoint_of_another_model_is_refused(
    digits: Data, tmp_path: Path, checkpoint: bytes
) -> None:
    (tmp_path / CHECKPOINT).write_bytes(checkpoint)
    identity = {"dataset": "digits", "model": "mlp"}
    settings = quick(density=0.5, epochs=1)
    other = models.build("mlp", (1, 8, 8), 10, (32, 15))
    one = Trainer(other, digits, settings, out=tmp_path, identity=identity, device="cpu")
    with pytest.raises(
        ValueError, match=r"^model\.fc2\.weight: got '\(15, 32\)'; expected shape \(16"
    ):
        one.fit(resume=True)


def test_settings_may_be_numpy_numbers(digits: Data, tmp_path: Path) -> None:
    """A checkpoint holds plain numbers, which alone load again."""
    density: Any = np.linspace(0.1, 0.5, 5)[-1]
    options = {"density": density, "epochs": 1}
    assert type(density) is not float
    trainer(digits, tmp_path, **options).fit()
    trainer(digits, tmp_path, **options).fit(resume=True)


def test_what_a_kill_left_is_put_right(digits: Data, tmp_path: Path) -> None:
    """Metrics an epoch behind the checkpoint are written again, half-written files swept up."""
    options = {"density": 0.5, "epochs": 2}
    trainer(digits, tmp_path, **options).fit()
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole.splitlines(keepends=True)[0])
    (tmp_path / SUMMARY).unlink()
    (tmp_path / ".checkpoint.pt.123.part").write_bytes(b"half")
    trainer(digits, tmp_path, **options).fit(resume=True)
    assert (tmp_path / METRICS).read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} - {TENSORBOARD} == set(FILES)
