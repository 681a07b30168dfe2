"""The zoo's measurement, on small models: what is dead and what is gone; several seeds of each."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from torch import Tensor, nn
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from bench import environment
from bench.zoo import __main__ as command
from bench.zoo import measure as zoo
from bench.zoo.held_out import HELD_OUT
from bench.zoo.models import ZOO as LISTED
from bench.zoo.models import Entry
from bench.zoo.names import LIBRARIES, check, entry_of
from bench.zoo.table import as_json
from l0fast import prune
from l0fast.graph.calls import Example
from tests import ROOT
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO, image


def squeezenet() -> nn.Module:
    model = tv.SqueezeNet("1_1", num_classes=5, dropout=0.0)
    fires = [
        tv.squeezenet.Fire(12, 4, 6, 6), nn.MaxPool2d(3, 2, ceil_mode=True),
        tv.squeezenet.Fire(12, 4, 8, 8),
    ]  # fmt: skip
    model.features = nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.ReLU(True), *fires)
    model.classifier = nn.Sequential(nn.Conv2d(16, 5, 1), nn.AdaptiveAvgPool2d(1))
    return model


def shufflenet() -> nn.Module:
    return tv.ShuffleNetV2([1, 1, 1], [8, 12, 16, 24, 32], num_classes=5)


def mobilenet_v3() -> nn.Module:
    rows = [
        (8, 3, 12, 8, True, "RE", 2, 1),
        (8, 3, 24, 12, True, "HS", 2, 1),
        (12, 3, 24, 12, False, "HS", 1, 1),
    ]
    setting = [InvertedResidualConfig(*row, 1.0) for row in rows]
    return tv.MobileNetV3(setting, last_channel=20, num_classes=5)


def efficientnet() -> nn.Module:
    rows = [(1, 3, 1, 8, 8, 1), (4, 3, 2, 8, 16, 1), (4, 5, 2, 16, 16, 2)]
    setting = [tv.efficientnet.MBConvConfig(*row) for row in rows]
    return tv.EfficientNet(setting, dropout=0.0, last_channel=24, num_classes=5)


def regnet() -> nn.Module:
    parameters = tv.regnet.BlockParams([1, 1], [8, 16], [4, 8], [1.0, 1.0], [2, 2], 0.25)
    return tv.RegNet(parameters, num_classes=5, stem_width=8)


def swin() -> nn.Module:
    return tv.SwinTransformer([2, 2], 12, [2, 2], [2, 4], [4, 4], num_classes=5)


ENTRIES: dict[str, Entry] = {
    name: Entry("torchvision", build, lambda: (image(32),))
    for name, build in {
        "squeezenet": squeezenet,
        "shufflenet": shufflenet,
        "mobilenet v3": mobilenet_v3,
        "efficientnet": efficientnet,
        "regnet y": regnet,
        "swin": swin,
    }.items()
} | {
    name: Entry("torchvision", build, lambda example=example: (example(),))
    for name in ("vgg", "gpt2 with attributes")
    for build, example in [ZOO[name]]
}


@pytest.mark.parametrize(
    ("name", "seed"),
    telling(itertools.product(ENTRIES, [1, 2]), [("squeezenet", 1), ("gpt2 with attributes", 2)]),
)
def test_equal_and_smaller_whatever_the_weights_and_statistics(name: str, seed: int) -> None:
    row = zoo.measure(name, ENTRIES[name], seed, timed=False)
    assert row.failure == ""
    assert row.error_float64 <= 1e-10
    assert row.error_float32 <= 1e-5
    assert row.params[0] < row.params[1]
    assert row.macs[0] < row.macs[1]
    assert 0 < row.gone <= row.dead


class Bottle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_dead_and_gone_written_out() -> None:
    """Linears 6-8-5, half of both layers' gates closed: 3 of 6 inputs, 4 of 8 hidden units."""
    row = zoo.measure("it", Entry("", Bottle, lambda: (torch.randn(16, 6),)), timed=False)
    assert (row.gated, row.gates) == (2, 14)
    columns, rows, bias, reader = 8 * 3, 3 * 4, 4, 5 * 4
    assert row.dead == columns + rows + bias + reader
    # The pixels that `first` does not read are gathered: only its closed rows are gone.
    assert row.gathered == 3 * 4
    assert row.gone == row.dead - row.gathered
    assert row.dead_but_there == {"first.weight": 12}
    assert (row.removed, row.compacted, row.kept) == (1, 1, 0)


def test_attention_that_becomes_layers_is_weighed() -> None:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        return nn.Sequential(layer, nn.Linear(8, 3))

    row = zoo.measure("it", Entry("", build, lambda: (torch.randn(2, 3, 8),)), timed=False)
    gated = 3 * 8 * 8 + 8 * 8 + 12 * 8  # in_proj, out_proj and linear2
    assert row.weights == (gated, gated + 12 * 8 + 3 * 8)


def test_a_pruned_model_of_another_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, args: Any) -> nn.Module:
        small: Any = prune(model, args)
        with torch.no_grad():
            small.second.bias[0] += 1e-3
        return small

    monkeypatch.setattr(zoo.l0fast, "prune", wrong)
    row = zoo.measure("it", Entry("", Bottle, lambda: (torch.randn(16, 6),)), timed=False)
    assert row.error_float64 > 1e-5


def test_the_command_writes_a_table_and_tells_what_is_missing(tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys; from bench.zoo import __main__ as main;"
        "importlib.util.find_spec = lambda name: None;"
        f"sys.exit(main.main(['timm', '--out', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(1),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "timm is not installed (pip install .[zoo])" in done.stdout
    assert "timm/resnet10t | timm is not installed" in (tmp_path / "zoo.md").read_text()
    assert (tmp_path / "zoo.csv").read_text().count("\n") > 10


def test_rows_of_another_commit_stay_and_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(LISTED)[:3]
    equal: dict[str, Any] = {"error_float64": 0.0, "error_float32": 0.0}
    equal |= dict.fromkeys(("weights", "params", "macs"), (1, 1))
    rows = [zoo.Result(name, 0, commit="abc", gates=1, **equal) for name in names]
    for keep, expected in ((True, [7, 1, 1]), (False, [7])):
        (tmp_path / "zoo.json").write_text(as_json(rows, {}), encoding="utf-8")
        monkeypatch.setattr(command, "_one", lambda name, _: zoo.Result(name, 0, gates=7, **equal))
        command.main([names[0], "--out", str(tmp_path), *(["--keep"] if keep else [])])
        found = json.loads((tmp_path / "zoo.json").read_text(encoding="utf-8"))["rows"]
        assert [row["gates"] for row in found] == expected
        told = f"Measured at abc: {', '.join(names[1:])}."
        assert (told in (tmp_path / "zoo.md").read_text(encoding="utf-8")) == keep


@pytest.mark.parametrize(
    "name",
    [
        "timm/cait_xxs24_224",
        "diffusers/UNet2DConditionModel",
        "torchvision/resnet34",
        "transformers/bart",
        *telling(
            ["torchvision/mvit_v2_s", "transformers/DeiTConfig", "transformers/Qwen3Config"], []
        ),
    ],
)
def test_a_model_that_is_in_no_list_is_built_from_its_name(name: str) -> None:
    pytest.importorskip(name.partition("/")[0])
    assert name not in LISTED
    entry = entry_of(name)
    with torch.no_grad():
        first, second = (Example.of(entry.example()) for _ in range(2))
        assert first.call(entry.build().eval()) is not None
    pairs = zip(first.tensors(), second.tensors(), strict=True)
    assert any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.exhaustive
def test_a_row_of_a_model_that_is_in_no_list() -> None:
    """Its forward takes keyword arguments; a Linear without gates has weights, too."""
    row = zoo.measure("it", entry_of("transformers/electra"), timed=False)
    assert row.error_float64 <= 1e-10
    assert 0 < row.gated < row.layers
    assert 0 < row.weights[0] < row.weights[1]
    assert 0 < row.gone <= row.dead
    assert row.gating_seconds > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/resnet19", "a model of torchvision.models.list_models()"),
        ("transformers/Bertt", "a class of a model's configuration or a model type"),
        ("tim/resnet10t", "one of timm, torchvision, transformers, diffusers"),
        ("timm/", "one of timm, torchvision, transformers, diffusers"),
    ],
)
def test_a_name_that_does_not_exist_is_one_clear_error(
    name: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([name])
    said = capsys.readouterr().err
    assert f"names: got {name!r}; expected" in said
    assert expected in said
    assert "Traceback" not in said


def test_every_name_of_the_held_out_list_exists() -> None:
    assert len(set(HELD_OUT)) == len(HELD_OUT) >= 30
    for name in HELD_OUT:
        check(name)
    assert {name.partition("/")[0] for name in HELD_OUT} >= set(LIBRARIES)


def test_a_model_that_takes_too_long_says_where_it_was(tmp_path: Path) -> None:
    options = ["torchvision/densenet121", "--untimed", "--limit", "1", "--out", str(tmp_path)]
    assert command.main(options) == 1
    (row,) = json.loads((tmp_path / "zoo.json").read_text())["rows"]
    assert row["failure"] == "did not end within 1 s"
    assert row["last_lines"][0].startswith("  File ")
