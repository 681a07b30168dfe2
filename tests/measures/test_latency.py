"""Latency by a table: its file, its interpolation, and what targets hold by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from l0fast import (
    DensityConstraint,
    LatencyTable,
    Trainer,
    frontier,
    measure_latency,
    prune,
    sparsify_,
)
from l0fast.constraints.magnitude import MagnitudePruning
from l0fast.data.sets import Data
from l0fast.layers.handle import gated_layers
from l0fast.measures.latency import Grids
from l0fast.pruning import timing
from l0fast.training.checkpoint import CHECKPOINT, Checkpoint
from l0fast.training.folder import LATENCY
from tests.helpers.counting import Counting
from tests.helpers.plain_models import mlp
from tests.helpers.runs import quick, small_mlp, trainer
from tests.helpers.tables import by, linear, small_mlp_table
from tests.helpers.thinned import telling, thinned

X = torch.randn(4, 6)


def table() -> LatencyTable:
    """Of `model()`, bilinear in the widths, so that interpolation is exact."""
    return LatencyTable(
        {
            "0": by(linear(1, 2, 0.1), [1, 2, 4, 6], [1, 5, 12]),
            "2": by(linear(3, 1, 0.2), [1, 7, 12], [1, 9]),
            "4": by(linear(2, 1, 0.5), [1, 3, 9], [3]),
        },
        rest=2e-6,
        about={"device": "one of which nothing is known"},
    )


def model() -> Any:
    """6-12-9-3, with gates on all inputs, that differ."""
    gated = sparsify_(mlp(6, 12, 9, 3), example_inputs=X)
    with torch.no_grad():
        for layer in gated_layers(gated).values():
            layer.log_alpha.copy_(torch.linspace(3.0, -1.0, layer.num_gates))
    return gated.eval()


def seconds(a: Any, b: Any, c: Any) -> Any:
    first, second, third = linear(1, 2, 0.1), linear(3, 1, 0.2), linear(2, 1, 0.5)
    return first(a, b) + second(b, c) + third(c, 3) + 2e-6


# --- the table -----------------------------------------------------------------------------------


def test_it_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    table().save(path)
    assert LatencyTable.load(path).as_json() == table().as_json()
    with pytest.raises(FileNotFoundError, match="other"):
        LatencyTable.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"rest": -1.0},
        {"rest": None},
        {"layers": {"0": {"inputs": [1], "outputs": [1, 2], "seconds": [[1.0]]}}},
        {"layers": {"0": {"inputs": [2, 1], "outputs": [1], "seconds": [[1.0], [2.0]]}}},
        {"layers": {"0": {"inputs": [1], "outputs": [1], "seconds": [[-1.0]]}}},
        {"layers": {"0": {"inputs": [1], "seconds": [[1.0]]}}},
    ],
)
def test_what_is_no_table_is_refused(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(table().as_json() | change))
    with pytest.raises(ValueError, match=r"^path: got .*latency.json'; expected a latency table"):
        LatencyTable.load(path)
    for content in (b"[]", b"", b"\xff\x00{"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^option: got .*; expected a latency table that "):
            LatencyTable.load(path, "option")


def test_interpolation() -> None:
    f = linear(1, 2, 0.1)
    grids = Grids.of([by(f, [1, 2, 4, 6], [1, 5, 12]), by(f, [7], [3])])
    inputs = torch.tensor([3.3, 7.0], dtype=torch.float64, requires_grad=True)
    outputs = torch.tensor([10.9, 3.0], dtype=torch.float64, requires_grad=True)
    got = grids.at(inputs, outputs)
    torch.testing.assert_close(got.detach(), torch.tensor([f(3.3, 10.9), f(7, 3)]).double())
    di, do = torch.autograd.grad(got[0], [inputs, outputs])
    torch.testing.assert_close(di[0], torch.tensor(1e-6 * (1 + 1.09)).double())
    torch.testing.assert_close(do[0], torch.tensor(1e-6 * (2 + 0.33)).double())
    # At the widths that were measured, and beyond them.
    for i, o in ((1, 1), (2, 5), (6, 12), (4, 12)):
        at = torch.tensor([i, 7.0]).double(), torch.tensor([o, 3.0]).double()
        assert float(grids.at(*at)[0]) == f(i, o)
    beyond = grids.at(torch.tensor([0.5, 9.0]).double(), torch.tensor([99.0, 3.0]).double())
    torch.testing.assert_close(beyond, torch.tensor([f(1, 12), f(7, 3)]).double())


# --- the measure ---------------------------------------------------------------------------------


def test_the_expectation_written_out() -> None:
    gated = model().double()
    a, b, c = (layer.open_probability().sum() for layer in gated_layers(gated).values())
    constraint = DensityConstraint(gated, 0.9, measure=table(), example_inputs=X.double())
    assert constraint.measure == "latency"
    share = seconds(a, b, c) / seconds(6, 12, 9)
    got = constraint.densities()
    torch.testing.assert_close(got, share.reshape(1))
    gates = [layer.log_alpha for layer in gated_layers(gated).values()]
    wanted = torch.autograd.grad(share, gates, retain_graph=True)
    for dgate, other in zip(torch.autograd.grad(got, gates), wanted, strict=True):
        torch.testing.assert_close(dgate, other)
    layers = DensityConstraint(
        gated, {"2": 0.9, "[04]": 0.8}, measure=table(), example_inputs=X.double()
    )
    first, second, third = linear(1, 2, 0.1), linear(3, 1, 0.2), linear(2, 1, 0.5)
    shares = [
        second(b, c) / second(12, 9),
        (first(a, b) + third(c, 3)) / (first(6, 12) + third(9, 3)),
    ]
    torch.testing.assert_close(layers.densities(), torch.stack(shares))


@pytest.mark.parametrize("target", telling([0.5, "50 us"], ["50 us"]))
def test_prune_holds_the_tables_prediction_and_says_what_it_measured(target: Any) -> None:
    gated, own = model(), table()
    _held = DensityConstraint(gated, target, measure=own, example_inputs=X)
    small: Any = prune(gated, X)
    widths = [int(width) for width in small.report.architecture.split("-")]
    (group,) = small.report.groups.values()
    assert group["kept"] == pytest.approx(seconds(*widths), rel=1e-12)
    assert group["total"] == pytest.approx(seconds(6, 12, 9), rel=1e-12)
    assert group["density"] <= (target if isinstance(target, float) else 50e-6 / group["total"])
    assert small.report.forced > 0
    after, before = small.report.latency
    assert 0 < after < 1
    assert 0 < before < 1
    named: Any = prune(gated, X, target, measure=own).report
    assert named.layers == small.report.layers
    assert prune(gated, X, 0.9).report.latency is None  # type: ignore[index]
    # As a part of another model, whose names are longer.
    outer: Any = prune(nn.Sequential(nn.Identity(), gated), X).report
    (inner,) = outer.groups.values()
    assert [inner["kept"], inner["total"]] == [group["kept"], group["total"]]


def test_a_step_reads_nothing_back() -> None:
    gated = model()
    constraint = DensityConstraint(gated, 0.5, measure=table(), example_inputs=X)
    with Counting() as counting:
        constraint().backward()
        constraint.step()
    assert counting.calls["searchsorted"] == 2  # it has counted what there was
    assert counting.calls["_local_scalar_dense"] == 0


def test_a_state_brings_its_table() -> None:
    """What was measured before the interruption is gone on with, not what is measured now."""
    gated = model()
    constraint = DensityConstraint(gated, "50 us", measure=table(), example_inputs=X)
    other = table()
    slower = {name: by(linear(5, 1, 1), la.inputs, la.outputs) for name, la in other.layers.items()}
    again = model()
    resumed = DensityConstraint(again, 0.9, measure=LatencyTable(slower, 0.0, {}), example_inputs=X)
    assert not torch.equal(resumed.densities(), constraint.densities())
    state = json.loads(json.dumps(constraint.get_extra_state()))  # what a checkpoint may hold
    resumed.load_state_dict({**constraint.state_dict(), "_extra_state": state})
    assert torch.equal(resumed.densities(), constraint.densities())
    assert resumed.targets == constraint.targets
    assert resumed.table is not None
    assert resumed.table.as_json() == table().as_json()
    one: Any = prune(gated, X).report
    two: Any = prune(again, X).report
    assert one.groups == two.groups
    assert one.layers == two.layers


def test_tables_of_another_model_are_refused() -> None:
    other = sparsify_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), example_inputs=X)
    line = r"^measure: got 'a latency table of 3 layers'; expected one of this model, with '0' of"
    with pytest.raises(ValueError, match=line):
        DensityConstraint(other, 0.5, measure=table(), example_inputs=X)
    with pytest.raises(ValueError, match=r"^example_inputs: got None; .*measure='latency'"):
        DensityConstraint(other, 0.5, measure=table())
    with pytest.raises(ValueError, match=r"^model: got 'Linear'; expected a model with gates"):
        measure_latency(nn.Linear(3, 3), X)


def test_magnitude_pruning_goes_by_the_table_of_its_state() -> None:
    other = table()
    steeper = by(linear(9, 9, 3), [1, 2, 4, 6], [1, 5, 12])
    other = LatencyTable(other.layers | {"0": steeper}, other.rest, other.about)
    kept: list[list[int]] = []
    state: dict[str, Any] = {}
    for measure in (table(), other):
        torch.manual_seed(0)
        term = MagnitudePruning(model(), 0.6, steps=4, measure=measure, example_inputs=X)
        if state:
            term.load_state_dict(state)
        state = state or term.state_dict()
        term.prune_to_(0.0)
        kept.append([int((layer.log_alpha > 0).sum()) for layer in term.layers.values()])
    assert kept[0] == kept[1]


def count_measurements(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One more entry for each table of the trainer's small MLP; the first is another than the
    rest."""
    measured_so_far: list[int] = []

    def measured(*_: Any) -> LatencyTable:
        measured_so_far.append(1)
        return small_mlp_table((1, 1, 1) if len(measured_so_far) == 1 else (1, 4, 4))

    monkeypatch.setattr(timing, "measure_latency", measured)
    return measured_so_far


@pytest.mark.parametrize(
    "settings",
    thinned(
        [
            {"density": "1.5 ms", "dual": "augmented", "target_schedule": "cubic"},
            {"density": "1.5 ms", "dual": "pi"},
            {"density": 0.6, "method": "magnitude"},
        ],
        3,
    ),
    ids=["augmented", "pi", "magnitude"],
)
def test_a_resumed_run_goes_by_the_first_table_alone(
    settings: dict[str, Any], digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another measurement would have other gains and ranks of what to prune: there is none."""
    measured_so_far = count_measurements(monkeypatch)
    chosen = {**settings, "measure": "latency", "epochs": 4}
    whole, part = tmp_path / "whole", tmp_path / "part"

    def keep(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            shutil.copytree(whole, part)

    trainer(digits, whole, **chosen).fit(on_epoch=keep)
    trainer(digits, part, **chosen).fit(resume=True)
    assert len(measured_so_far) == 1
    ends = [Checkpoint.read(path / CHECKPOINT, torch.device("cpu")) for path in (whole, part)]
    assert ends[0].history == ends[1].history
    torch.testing.assert_close(ends[0].model, ends[1].model, rtol=0, atol=0)


def test_a_training_by_a_table_measured_before(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> LatencyTable:
        raise AssertionError("measured")

    monkeypatch.setattr(timing, "measure_latency", measured)
    shares: list[float] = []
    for costs in ((1, 1, 1), (1, 9, 9)):
        mine = small_mlp_table(costs)
        settings = quick(density=0.6, measure="latency", epochs=2)
        run = Trainer(small_mlp(), digits, settings, out=tmp_path / f"{costs}", table=mine)
        summary = run.fit()
        assert summary["feasible"]
        assert summary["latency_fraction"] <= 0.6
        shares.append(summary["latency_fraction"])
        saved = LatencyTable.load(tmp_path / f"{costs}" / LATENCY)
        assert saved.as_json() == mine.as_json()
    assert shares[0] != shares[1]
    with pytest.raises(ValueError, match=r"^table: got 'a latency table'; expected none for mea"):
        Trainer(small_mlp(), digits, quick(density=0.6), table=small_mlp_table((1, 1, 1)))
    other = LatencyTable({"other": by(linear(0, 0, 1), [1, 2], [1, 2])}, 0.0, {})
    with pytest.raises(TypeError, match=r"^table: got 't\.json'; expected a LatencyTable or None"):
        Trainer(small_mlp(), digits, quick(measure="latency", density=0.6), table="t.json")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^measure: .*fc"):
        Trainer(small_mlp(), digits, quick(density=0.6, measure="latency"), table=other)


def test_one_table_for_all_targets(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_so_far = count_measurements(monkeypatch)
    settings = quick(density=1.0, measure="latency", epochs=2)
    targets = (0.9, 0.6)
    frontier(small_mlp(), digits, settings, targets, out=tmp_path / "f", device="cpu")
    assert len(measured_so_far) == 1
    tables = [LatencyTable.load(tmp_path / "f" / f"density-{t}" / LATENCY) for t in targets]
    assert tables[0].as_json() == tables[1].as_json() == small_mlp_table((1, 1, 1)).as_json()
    # A resumed one goes by the first one's too, where the second had not begun.
    shutil.rmtree(tmp_path / "f" / "density-0.6")
    frontier(small_mlp(), digits, settings, targets, out=tmp_path / "f", device="cpu", resume=True)
    assert len(measured_so_far) == 1
    again = LatencyTable.load(tmp_path / "f" / "density-0.6" / LATENCY)
    assert again.as_json() == tables[0].as_json()


def test_a_resumed_run_takes_no_other_table(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "measure_latency", None)  # never
    settings = quick(density=0.6, measure="latency", epochs=2)
    first, second = small_mlp_table((1, 1, 1)), small_mlp_table((1, 9, 9))
    options: dict[str, Any] = {"out": tmp_path / "run", "device": "cpu"}
    one = Trainer(small_mlp(), digits, settings, table=first, **options)
    one.open()
    one.folder.close()
    line = r"^table: got 'another latency table'; expected the one of .*checkpoint\.pt, or none"
    with pytest.raises(ValueError, match=line):
        Trainer(small_mlp(), digits, settings, table=second, **options)
    for same in (small_mlp_table((1, 1, 1)), None):
        again = Trainer(small_mlp(), digits, settings, table=same, **options)
        again.open(resume=True)
        assert isinstance(again.term, DensityConstraint)
        assert again.term.table is not None
        assert again.term.table.as_json() == first.as_json()
        again.folder.close()
