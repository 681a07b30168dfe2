"""The command: what it writes, and one line with exit code 2 for whatever cannot be."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from l0fast import Trainer, TrainerSettings, load_pruned
from l0fast.data import sets
from l0fast.training import models
from l0fast.training.checkpoint import CHECKPOINT
from l0fast.training.folder import FILES, LATENCY, METRICS, PLOT, PRUNED, SUMMARY
from l0fast.training.stepping import Stepping
from l0fast.training.tensorboard import TENSORBOARD
from tests import ROOT
from tests.helpers.command import refused, run, tree
from tests.helpers.images import tiny_imagefolder
from tests.helpers.tables import small_mlp_table

pytestmark = pytest.mark.usefixtures("a_folder_of_its_own")

FAST = ["train", "--widths", "16-8", "--epochs", "2", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of FAST with --density 0.5."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run(*FAST, "--density", "0.5", "--quiet", "--out", str(out)) == 0
    return out


# --- what works ----------------------------------------------------------------------------------


def test_a_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert {path.name for path in finished.iterdir()} - {TENSORBOARD} == set(FILES)
    summary = json.loads((finished / SUMMARY).read_text())
    identity = {"dataset": "digits", "model": "mlp", "widths": [16, 8], "recipe": "default"}
    assert summary.items() >= (identity | {"seed": 0, "epochs": 2, "target_density": 0.5}).items()
    assert summary["feasible"] is True
    assert summary["validation_fraction"] == 1 / 12

    def dense() -> torch.nn.Module:
        return models.build("mlp", (1, 8, 8), 10, (16, 8))

    small = load_pruned(dense, finished / PRUNED)
    assert sum(p.numel() for p in small.parameters()) == summary["params"]


def test_the_report_and_the_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAST, "--density", "0.5", "--compare-dense", "--out", "x") == 0
    said = capsys.readouterr()
    summary = json.loads(Path("x", SUMMARY).read_text())
    dense = json.loads(Path("x", "dense", SUMMARY).read_text())
    assert summary["dense_test_error_percent"] == dense["test_error_percent"]
    error, other = summary["test_error_percent"], dense["test_error_percent"]
    beside = f"test error {error:.2f} % (dense: {other:.2f} %)"
    assert f"pruned model {summary['architecture']}: {beside}" in said.out.splitlines()
    assert f"density {summary['realised_density']:.4f}, within 0.5" in said.out
    for word in ("loss", "test error", "density", "lambda", "2/2"):
        assert word in said.err
    assert str(Path("x", PLOT)) in said.out


def test_the_report_names_the_measure(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--density", "0.5", "--measure", "params", "--out", "x")
    assert run(*FAST, "--quiet", *arguments, "--compare-dense") == 0
    summary = json.loads(Path("x", SUMMARY).read_text())
    line = f"params {summary['params_fraction']:.4f}, within 0.5"
    assert line in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "out", "wanted"),
    [
        (("--density", "0.5"), "digits-mlp-density-0.5-seed-0", {"target_density": 0.5}),
        (("--density", "1", "--seed", "7"), "digits-mlp-density-1-seed-7", {"seed": 7}),
        (
            ("--density", "0.5", "--measure", "macs"),
            "digits-mlp-macs-0.5-seed-0",
            {"target_density": 0.5, "measure": "macs", "feasible": True},
        ),
        (
            ("--layer-density", "fc1=0.5,fc[23]=0.75"),
            "digits-mlp-density-fc1=0.5,fc[23]=0.75-seed-0",
            {"target_layer_density": {"fc1": 0.5, "fc[23]": 0.75}},
        ),
        (
            ("--layer-density", "0.5"),
            "digits-mlp-density-0.5-seed-0",
            {"target_layer_density": {"fc1": 0.5, "fc2": 0.5, "fc3": 0.5}},
        ),
        (
            ("--penalty", "0.1", "--penalty-per-example"),
            "digits-mlp-penalty-0.1-seed-0",
            {"penalty": 0.1, "feasible": None, "target_density": None},
        ),
        (("--dense",), "digits-mlp-dense-seed-0", {"params_fraction": 1.0, "feasible": None}),
        (
            ("--density", "0.5", "--recipe", "published"),
            "digits-mlp-density-0.5-seed-0",
            {"recipe": "published", "validation_fraction": 0.0, "validation_error_percent": None},
        ),
    ],
)
def test_options(arguments: tuple[str, ...], out: str, wanted: dict[str, Any]) -> None:
    assert run(*FAST, "--quiet", *arguments) == 0
    summary = json.loads(Path("runs", out, SUMMARY).read_text())
    assert summary.items() >= wanted.items()


def test_settings_reach_the_trainer() -> None:
    numbers = {"lr": 0.002, "gate_lr": 0.03, "dual_lr": 0.5, "weight_decay": 0.01}
    options = [text for k, v in numbers.items() for text in (f"--{k.replace('_', '-')}", str(v))]
    options += ["--batch-size", "500", "--no-restarts", "--validation-fraction", "0.25"]
    options += ["--skip", "on"]
    assert run(*FAST, "--quiet", "--density", "0.5", *options, "--out", "x") == 0
    summary = json.loads(Path("x", SUMMARY).read_text())
    expected = numbers | {"batch_size": 500, "restarts": False, "epochs": 2, "density": 0.5}
    expected |= {"skip": True}
    assert summary["settings"].items() >= expected.items()
    assert summary["validation_fraction"] == 0.25


def test_lenet_and_the_published_recipe() -> None:
    fast = ["train", "--model", "lenet5", "--widths", "3-4-5", "--epochs", "1", "--quiet"]
    assert run(*fast, "--density", "0.5", "--recipe", "published", "--out", "x") == 0
    summary = json.loads(Path("x", SUMMARY).read_text())
    assert summary["feasible"] is True
    assert len(summary["architecture"].split("-")) == 4
    assert summary["settings"]["lr"] == models.PUBLISHED_SETTINGS["lr"]
    assert summary["settings"]["epochs"] == 1  # a flag goes before the recipe
    # Gates start at droprate 0.5 and can move by 12 steps of 7e-4 at most.
    start = 1 / (1 + 11 ** (-2 / 3))
    assert summary["expected_density"] == pytest.approx(start, abs=12 * 7e-4 / 4 + 1e-3)


def test_a_latency_table_from_before() -> None:
    table = small_mlp_table((1, 1, 1))
    table.save("table.json")
    asked = [*FAST, "--widths", "32-16", "--measure", "latency", "--quiet"]
    asked += ["--latency-table", "table.json"]
    assert run(*asked, "--density", "0.5", "--compare-dense", "--out", "one") == 0
    assert run(*asked, "--density", "0.8,0.5", "--out", "f") == 0
    for folder in ("one", "f/density-0.8", "f/density-0.5"):
        assert json.loads(Path(folder, LATENCY).read_text()) == table.as_json()


@pytest.mark.parametrize("method", ["constraint", "penalty"])
def test_a_collapse_is_told_once_and_at_the_end(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "constraint": ["--density", "0.1", "--dual-lr", "30", "--no-restarts"],
        "penalty": ["--penalty", "1000"],
    }[method]
    fast = [*FAST, "--epochs", "4", "--gate-lr", "0.5", "--settle", "0", "--quiet"]
    assert run(*fast, *options, "--out", "x") == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in Path("x", METRICS).read_text().splitlines()]
    first = next(row for row in rows if row["collapsed"])
    collapsed = json.loads(Path("x", SUMMARY).read_text())["collapsed"]
    remedy = {
        "constraint": "a higher density, a smaller --dual-lr (it is 30) or more --epochs",
        "penalty": "a smaller --penalty",
    }[method]

    def line(layers: list[str]) -> str:
        names = ", ".join(layers)
        closed = f"collapsed: all gates of {names} are closed, nothing passes through"
        return f"{closed}; try {remedy}"

    during = f"epoch {first['epoch']}: {line(first['collapsed'])}"
    assert said.err.strip().splitlines() == [during]
    assert line(collapsed) in said.out.splitlines()


def test_several_targets_from_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*FAST, "--quiet", "--density", ".8,.5", "--out", "f"]
    assert run(*arguments) == 0
    said = capsys.readouterr().out
    rows = json.loads(Path("f/frontier.json").read_text())
    for row, target in zip(rows, (0.8, 0.5), strict=True):
        summary = json.loads(Path(f"f/density-{target:g}", SUMMARY).read_text())
        del summary["sha256"]
        assert row.items() >= summary.items()
        assert f"{summary['params']:,}" in said
    before = tree(Path("f/density-0.5"))
    assert run(*arguments, "--resume") == 0
    after = tree(Path("f/density-0.5"))
    assert all(after[name] == before[name] for name in (METRICS, SUMMARY, PRUNED, CHECKPOINT))


def test_the_dense_model_beside_one_that_shrinks() -> None:
    words = ("--density", "0.5", "--shrink", "1", "--compare-dense", "--quiet", "--out", "s")
    assert run(*FAST, *words) == 0
    assert json.loads(Path("s/dense", SUMMARY).read_text())["settings"]["shrink"] is None


def test_resume_of_a_finished_run_changes_nothing(finished: Path) -> None:
    shutil.copytree(finished, "run")
    before = tree(Path("run"))
    assert run(*FAST, "--quiet", "--density", "0.5", "--out", "run", "--resume") == 0
    after = tree(Path("run"))
    for name in (METRICS, SUMMARY, PRUNED, CHECKPOINT):
        assert after[name] == before[name], name


def test_an_interrupt_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Stepping, "epoch", interrupt)
    assert run(*FAST, "--quiet", "--density", "0.5") == 130
    error = capsys.readouterr().err
    assert "--resume" in error
    assert error.count("\n") == 1


# --- other models and data ------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_torchvision_model_on_an_imagefolder_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All the way: trained, pruned again from the checkpoint, reported, resumed."""
    tiny_imagefolder(tmp_path / "images", sizes=((32, 40),))
    torch.save(models.build("resnet18", (3, 32, 32), 2).state_dict(), tmp_path / "resnet.pt")
    fast = ["train", "--model", "resnet18", "--dataset", "imagefolder", "--data-root", "images"]
    fast += ["--image-size", "32", "--epochs", "1", "--quiet", "--validation-fraction", "0"]
    fast += ["--pretrained", "resnet.pt", "--density", "0.5", "--device", "cpu", "--out", "x"]
    assert run(*fast) == 0
    summary = json.loads(Path("x", SUMMARY).read_text())
    wanted = {"model": "resnet18", "dataset": "imagefolder", "pretrained": "resnet.pt"}
    assert summary.items() >= (wanted | {"in_shape": [3, 32, 32], "num_classes": 2}).items()
    assert summary["feasible"] is True
    assert run("prune", "x/checkpoint.pt", "--out", "again.safetensors") == 0
    small = load_pruned(lambda: models.build("resnet18", (3, 32, 32), 2), "again.safetensors")
    assert sum(p.numel() for p in small.parameters()) == summary["params"]
    assert run("report", "x/checkpoint.pt") == 0
    assert "layer4.1.conv2" in capsys.readouterr().out
    (tmp_path / "resnet.pt").rename("other.pt")
    fast[fast.index("resnet.pt")] = "other.pt"
    message = refused(capsys, *fast, "--resume")
    assert "pretrained: got 'other.pt'; expected 'resnet.pt', as in the checkpoint" in message


def test_a_users_model_starts_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(),"
        " nn.Linear(6, num_classes))\n"
    )
    source = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 6), torch.nn.ReLU(), torch.nn.Linear(6, 10)
    )
    save_file(source.state_dict(), "own.safetensors")
    options = ["--lr", "1e-30", "--density", "1", "--epochs", "1", "--quiet", "--device", "cpu"]
    command = ["train", "--model", "own_nets:net", *options, "--pretrained", "own.safetensors"]
    assert run(*command) == 0
    out = Path("runs", "digits-own_nets.net-density-1-seed-0")
    state = torch.load(out / CHECKPOINT, weights_only=True)["model"]
    for name, value in source.state_dict().items():
        torch.testing.assert_close(state[name], value)
    assert run("prune", str(out / CHECKPOINT), "--model", "own_nets:net", "--force") == 0
    assert "gates" in capsys.readouterr().out


def test_a_density_for_each_layer_leaves_out_what_has_no_gates(tmp_path: Path) -> None:
    (tmp_path / "normed.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    first, norm = nn.Linear(64, 6), nn.BatchNorm1d(6)\n"
        "    return nn.Sequential(nn.Flatten(), first, norm, nn.Linear(6, 10))\n"
    )
    options = ["--model", "normed:net", "--layer-density", "0.5", "--epochs", "1", "--out", "x"]
    assert run("train", "--quiet", "--device", "cpu", *options) == 0
    summary = json.loads(Path("x", SUMMARY).read_text())
    assert summary["target_layer_density"] == {"1": 0.5, "3": 0.5}


# --- prune and report -----------------------------------------------------------------------------


OPTIONS = [
    ("--density", "0.5"),
    ("--layer-density", "fc1=0.4,fc[23]=0.6"),
    ("--penalty", "0.1"),
    ("--density", "0.5", "--recipe", "published"),
    ("--density", "0.95", "--select", "best", "--epochs", "4"),
]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(one, marks=[pytest.mark.exhaustive] * (place not in (1, 4)))
        for place, one in enumerate(OPTIONS)
    ],
)
def test_prune_makes_what_the_run_made(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, *options, "--quiet", "--out", "x") == 0
    wanted = Path("x", PRUNED).read_bytes()
    message = refused(capsys, "prune", "x/checkpoint.pt")
    assert (
        "out: got 'x/pruned.safetensors'; expected a file that does not exist yet (--f" in message
    )
    Path("x", PRUNED).unlink()
    assert run("prune", "x/checkpoint.pt") == 0
    assert "saved x/pruned.safetensors" in capsys.readouterr().out
    assert run("prune", "x/checkpoint.pt", "--force", "--out", "other.safetensors") == 0

    def load(path: Path) -> Any:
        return load_pruned(lambda: models.build("mlp", (1, 8, 8), 10, (16, 8)), path)

    (Path("x") / "first.safetensors").write_bytes(wanted)
    first, again, other = (
        load(Path(p)) for p in ("x/first.safetensors", "x/pruned.safetensors", "other.safetensors")
    )
    # The example is another, so that the error found in the proof may differ in the last bits.
    for report in (first.report, again.report, other.report):
        assert report.max_error <= report.tolerance
    facts = [{**one.report.as_json(), "max_error": 0.0} for one in (first, again, other)]
    assert facts[0] == facts[1] == facts[2]
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(other.state_dict()[name], value)


def test_prune_to_another_target(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(finished / CHECKPOINT)
    assert run("prune", checkpoint, "--target", "0.2", "--out", "a.safetensors") == 0
    assert "of at most 0.2" in capsys.readouterr().out
    assert run("prune", checkpoint, "--target", "fc1=0.1", "--out", "b.safetensors") == 0
    assert "fc1: gates" in capsys.readouterr().out
    Path("b.safetensors").write_text("precious")
    for target, words in (
        ("0", "target: got 0.0; expected a density in"),
        ("abc", "target: got 'abc'; expected a density in (0, 1], or an amount such as"),
        ("fc9=0.1", "target: got 'fc9'; expected a pattern that matches one of"),
    ):
        arguments = ("prune", checkpoint, "--target", target, "--out", "b.safetensors", "--force")
        assert words in refused(capsys, *arguments)
    assert "path: got 'no/b'" in refused(capsys, "prune", checkpoint, "--out", "no/b")


def test_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    before = tree(finished)
    assert run("report", str(finished / CHECKPOINT)) == 0
    text = capsys.readouterr().out
    assert tree(finished) == before
    lines = text.splitlines()
    assert lines[0] == "mlp on digits, epoch 2 of 2; gates:"
    assert "the gates meet the target" in lines  # they are settled
    row = json.loads((finished / METRICS).read_text().splitlines()[-1])
    for name, layer in row["layers"].items():
        table = next(line.split() for line in lines if line.startswith(name))
        assert table[2:4] == [str(layer["kept"]), str(layer["of"])]
        assert table[4] == f"{layer['expected_density']:.4f}"
    summary = json.loads((finished / SUMMARY).read_text())
    assert f"architecture: {summary['architecture']} (merged)" in lines
    assert f"parameters: {summary['params']:,} of {summary['dense_params']:,}" in text


def test_a_checkpoint_without_gates_or_of_the_class_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*FAST, "--dense", "--quiet", "--out", "dense") == 0
    message = refused(capsys, "prune", "dense/checkpoint.pt")
    assert "expected one of a model with gates (this one is dense)" in message
    settings = TrainerSettings(density=0.5, epochs=1, batch_size=1000)
    model = models.build("mlp", (1, 8, 8), 10, (8, 4))
    Trainer(model, sets.load("digits"), settings, out="own", device="cpu").fit()
    message = refused(capsys, "report", "own/checkpoint.pt")
    assert "expected one that `l0fast train` wrote (its identity has no 'dataset'" in message


# --- what does not -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "cifar"), "dataset: got 'cifar'; expected one of 'digits', 'mnist', 'fash"),
        (("--model", "vgg"), "model: got 'vgg'; expected 'mlp', 'lenet5', a torchvision model"),
        (("--dense", "--model", "resnet18"), "widths: got [16, 8]; expected none: only mlp and"),
        (("--dense", "--pretrained", "no.pt"), "pretrained: got 'no.pt'; expected a file with the"),
        (
            ("--dense", "--pretrained", "no.pt", "--recipe", "published"),
            "pretrained: got 'no.pt'; expected none: --recipe published initialises the",
        ),
        (
            ("--density", "0.5", "--latency-table", "t.json"),
            "latency_table: got 't.json'; expected --measure latency beside it",
        ),
        (
            ("--density", "0.5", "--measure", "latency", "--latency-table", "t.json"),
            "No such file or directory: 't.json'",
        ),
        (("--dense", "--image-size", "x"), "image_size: got 'x'; expected a whole number"),
        (("--dense", "--image-size", "8"), "image_size: got 8; expected none: the images"),
        (("--dense", "--dataset", "cifar10"), "data_root: got None; expected a torchvision data f"),
        (("--dense", "--dataset", "imagefolder", "--data-root", "no"), "data_root: got 'no'; expe"),
        (("--dense", "--select", "x"), "select: got 'x'; expected one of 'last', 'best'"),
        (
            ("--dense", "--select", "best", "--validation-fraction", "0"),
            "select: got 'best'; expected 'last', as there is no validation",
        ),
        (("--density", "0.5,0.6"), "targets: got [0.5, 0.6]; expected targets that fall"),
        (("--density", "0.5,x"), "targets[1]: got 'x'; expected a density in (0, 1], or an amount"),
        (("--density", "0.5,0.3", "--compare-dense"), "compare_dense: got True; expected one"),
        (("--skip", "x"), "skip: got 'x'; expected one of 'auto', 'on', 'off'"),
        (("--cuda-graph", "x"), "cuda_graph: got 'x'; expected one of 'auto', 'on', 'off'"),
        (
            ("--dense", "--cuda-graph", "on", "--device", "cpu"),
            "cuda_graph: got True; expected 'auto' or False on the device 'cpu'",
        ),
        (("--recipe", "x"), "recipe: got 'x'; expected one of 'default', 'published'"),
        (("--density", "0"), "density: got 0.0; expected a density in (0, 1]"),
        (("--density", "1.5"), "density: got 1.5; expected a density in (0, 1]"),
        (("--density", "-0.5"), "density: got -0.5; expected a density in (0, 1]"),
        (("--density", "nan"), "density: got nan; expected a density in (0, 1]"),
        (("--density", "abc"), "density: got 'abc'; expected a density in (0, 1], or an amount"),
        (("--density", ""), "density: got ''; expected a density in (0, 1], or an amount"),
        (("--density", "1e-9"), "got 1e-09; expected a density in [0.0"),
        (("--density",), "argument --density: expected one argument"),
        ((), "density: got None; expected --density, --layer-density, --penalty or --dense"),
        (("--layer-density", "fc9=0.5"), "got 'fc9'; expected a pattern that matches one of ['fc1"),
        (("--layer-density", "a=0.5,a=0.4"), "layer_density: got 'a=0.5,a=0.4'; expected NAME"),
        (("--layer-density", "fc1=0.5,f*=0.4"), "got 'fc1'; expected layers of one group only"),
        (("--layer-density", "fc1=0.5,"), "layer_density: got 'fc1=0.5,'; expected NAME=DENSITY"),
        (("--layer-density", "=0.5"), "layer_density: got '=0.5'; expected NAME=DENSITY,..."),
        (("--layer-density", "fc1=abc"), "layer_density['fc1']: got 'abc'; expected a density"),
        (("--layer-density", "fc1=1.5"), "layer_density['fc1']: got 1.5; expected a density in (0"),
        (("--layer-density", "fc1=1e-9"), "target['fc1']: got 1e-09; expected a density in [0.0"),
        (("--layer-density", "abc"), "layer_density['*']: got 'abc'; expected a density"),
        (("--density", "0.5", "--penalty", "1"), "penalty: got 1.0; expected only one of"),
        (("--density", "0.5", "--layer-density", "0.5"), "expected only one of density and layer"),
        (("--density", "0.5", "--measure", "x"), "measure: got 'x'; expected one of 'gates', 'par"),
        (("--penalty", "1", "--measure", "macs"), "measure: got 'macs'; expected a density or la"),
        (("--density", "0.5", "--dense"), "dense: got True; expected no --density"),
        (("--penalty", "-1"), "penalty: got -1.0; expected a number >= 0"),
        (("--penalty", "abc"), "penalty: got 'abc'; expected a number"),
        (("--dense", "--epochs", "0"), "epochs: got 0; expected a whole number >= 1"),
        (("--dense", "--epochs", "-1"), "epochs: got -1; expected a whole number >= 1"),
        (("--dense", "--epochs", "1.5"), "epochs: got '1.5'; expected a whole number"),
        (("--dense", "--batch-size", "0"), "batch_size: got 0; expected a whole number >= 1"),
        (("--dense", "--seed", "-1"), "seed: got -1; expected a whole number >= 0"),
        (("--dense", "--seed", "9" * 30), "seed: got 9999"),
        (("--dense", "--seed", "9" * 400), "seed: got 9999"),
        (("--dense", "--lr", "0"), "lr: got 0.0; expected a number > 0"),
        (("--density", "0.5", "--gate-lr", "x"), "gate_lr: got 'x'; expected a number"),
        (("--density", "0.5", "--dual-lr", "-1"), "dual_lr: got -1.0; expected a number >= 0"),
        (("--dense", "--threads", "0"), "threads: got 0; expected a whole number >= 1"),
        (("--dense", "--widths", "300-abc"), "widths: got 'abc'; expected a whole number"),
        (("--dense", "--widths", "300--100"), "widths: got ''; expected a whole number"),
        (("--dense", "--widths", "0"), "widths: got (0,); expected whole numbers >= 1"),
        (("--dense", "--model", "lenet5"), "widths: got (16, 8); expected three numbers"),
        (("--dense", "--validation-fraction", "1"), "validation_fraction: got 1.0; expected a num"),
        (("--dense", "--validation-fraction", "0.9999"), "validation_fraction: got 0.9999; expec"),
        (("--dense", "--device", "abc"), "device: got 'abc'; expected a device of this machine"),
        (("--dense", "--device", "meta"), "a device of this machine (meta computes nothing)"),
        (("--dense", "--flag"), "unrecognized arguments: --flag"),
        (("--dense", "--dataset", "mnist"), "data_root: got None; expected a torchvision data fol"),
        (("--dense", "--dataset", "mnist", "--data-root", "no"), "data_root: got 'no'; expected"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *FAST, *arguments, "--out", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("fly",), "invalid choice: 'fly'"),
        (("prune",), "the following arguments are required: CHECKPOINT"),
        (("report",), "the following arguments are required: CHECKPOINT"),
        (("prune", "no.pt"), "l0fast prune: checkpoint: got 'no.pt'; expected a whole checkpoint"),
        (("report", "no.pt"), "l0fast report: checkpoint: got 'no.pt'; expected a whole checkp"),
        (("--version-of-what",), "required: COMMAND"),
    ],
)
def test_bad_commands(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, *arguments)


def test_an_empty_data_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a network: one line, in no time."""
    (tmp_path / "root").mkdir()
    arguments = [*FAST, "--dense", "--dataset", "mnist", "--data-root", "root", "--out", "x"]
    code = run(*arguments)
    said = capsys.readouterr()
    assert code == 2
    assert said.err.count("\n") == 1
    assert "data_root: got 'root'; expected a torchvision data folder that holds MNIST" in said.err
    assert not Path("x").exists()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_truncated_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            (raw / f"{part}-{kind}.gz").write_bytes(gzip.compress(bytes(1000))[:-5])
    arguments = ["--dense", "--dataset", "mnist", "--data-root", "root", "--out", "x"]
    message = refused(capsys, *FAST, *arguments)
    assert "train-images-idx3-ubyte.gz" in message
    assert "expected a whole idx file of MNIST" in message


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/self", "/proc/none/x", "/dev/null"])
def test_a_folder_that_cannot_be_written(
    out: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if out.startswith("/") and not Path(out).parent.parent.exists():
        pytest.skip(f"no {Path(out).parent} here")
    Path("file").write_text("precious")
    monkeypatch.setattr(sets, "load", None)  # no data are read
    for words in ((), ("--density", "0.5,0.3")):
        message = refused(capsys, *FAST, "--density", "0.5", *words, "--out", out)
        assert f"out: got {out!r}; expected a folder that can be written" in message
    message = refused(capsys, "compare", *FAST[1:], "--density", "0.5", "--out", out)
    assert f"out: got {out!r}; expected a folder that can be written" in message


@pytest.mark.parametrize("density", ["1.5", "many", "0.5,1.5"])
def test_wrong_words_are_refused_before_any_data_are_read(
    density: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "load", None)
    assert "expected a density in (0, 1]" in refused(capsys, *FAST, "--density", density)


def test_an_existing_run_is_not_overwritten(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "run")
    message = refused(capsys, *FAST, "--density", "0.5", "--out", "run")
    assert "out: got 'run'; expected a folder without a run in it (or resume it)" in message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--density", "0.25"), "density: got 0.25; expected 0.5, as in the checkpoint run/check"),
        (("--density", "0.5", "--epochs", "3"), "epochs: got 3; expected 2, as in the checkpoint"),
        (("--density", "0.5", "--seed", "1"), "seed: got 1; expected 0, as in the checkpoint"),
        (("--density", "0.5", "--widths", "16-9"), "widths: got [16, 9]; expected [16, 8], as in"),
        (("--density", "0.5", "--model", "lenet5", "--widths", "3-4-5"), "expected 'mlp', as in"),
        (("--density", "0.5", "--recipe", "published"), "as in the checkpoint"),
        (("--penalty", "0.5"), "density: got None; expected 0.5, as in the checkpoint"),
        (("--dense",), "density: got None; expected 0.5, as in the checkpoint"),
    ],
)
def test_resuming_another_run(
    finished: Path, changed: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "run")
    assert message in refused(capsys, *FAST, *changed, "--out", "run", "--resume")


@pytest.mark.parametrize(
    "damage", [lambda c: c[: len(c) // 2], lambda c: b"", lambda c: b"garbage", lambda c: c[:-1]]
)
def test_a_damaged_checkpoint(
    finished: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, "run")
    path = Path("run", CHECKPOINT)
    path.write_bytes(damage(path.read_bytes()))
    message = refused(capsys, *FAST, "--density", "0.5", "--out", "run", "--resume")
    assert "resume: got 'run/checkpoint.pt'; expected a whole checkpoint of this project" in message


def test_a_loss_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(*FAST, "--quiet", "--density", "0.5", "--lr", "1e30", "--out", "x")
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("l0fast train: loss (epoch 1): got nan; expected finite numbers")
    assert error.count("\n") == 1
    assert not Path("x", SUMMARY).exists()


def test_as_a_process(tmp_path: Path) -> None:
    """What a shell sees: nothing but the line, and 2."""
    done = subprocess.run(
        [sys.executable, "-m", "l0fast", *FAST, "--density", "1.5", "--out", "x"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "l0fast train: density: got 1.5; expected a density in (0, 1]\n"
    assert list(tmp_path.iterdir()) == []
