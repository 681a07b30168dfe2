"""Where gates go by structure, and what the dry run says of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tests.helpers.plain_models as plain
from l0fast import prune, sparsify_
from l0fast.gating.table import GateTable
from l0fast.layers.handle import gate_owners, gated_layers
from tests.helpers.gated import snapshot
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO


def placed(model: nn.Module, x: Any, **options: Any) -> dict[str, tuple[str, int]]:
    """Layer -> (gates, units a gate), of those that have any."""
    table = sparsify_(model, example_inputs=x, dry_run=True, **options)
    rows = {row.name: (row.gates, row.units) for row in table.layers if row.gates}
    # The dry run tells what is then done.
    sparsify_(model, example_inputs=x, **options)
    layers = gated_layers(model)
    assert {name: (layer.gates, layer.units) for name, layer in layers.items()} == rows
    counts = {row.name: row.num_gates for row in table.layers if row.gates}
    assert {name: layer.num_gates for name, layer in layers.items()} == counts
    return rows


def reasons(model: nn.Module, x: Any) -> dict[str, str]:
    table = sparsify_(model, example_inputs=x, dry_run=True)
    for row in table.layers:
        assert bool(row.reason) != bool(row.gates) or row.reason.startswith("the gates of ")
    return {row.name: row.reason for row in table.layers if not row.gates}


def zoo(name: str) -> tuple[nn.Module, Any]:
    build, example = ZOO[name]
    return build(), example()


def test_the_published_models_have_their_published_gates() -> None:
    assert placed(plain.LeNet(), torch.randn(1, 1, 28, 28)) == {
        "conv1": ("output", 1),
        "conv2": ("output", 1),
        "fc1": ("input", 1),
        "fc2": ("input", 1),
    }
    assert placed(*zoo("mlp ReLU")) == dict.fromkeys(("0", "2", "4"), ("input", 1))


PLACES: dict[str, dict[str, tuple[str, int]]] = {
    "vgg": {
        "features.4": ("input", 1),
        "features.8": ("input", 1),
        "classifier.0": ("input", 4),  # a channel, flattened to four places
        "classifier.3": ("input", 1),
    },
    "gpt2": {
        f"h.{block}.{name}": ("input", units)
        for block in (0, 1)
        for name, units in (("attn.c_proj", 4), ("mlp.2", 1))
    },
    "bert": {
        "attention.dense": ("input", 4),
        "output": ("input", 1),
        "classifier": ("input", 1),
    },
    "llama": {"o_proj": ("input", 8), "down_proj": ("input", 1)},
    "channelwise": {"3": ("input", 4), "6": ("input", 3)}
    | dict.fromkeys(("9", "12", "15", "20"), ("input", 1)),
    "unet": dict.fromkeys(("down.3", "bottom.0", "bottom.3", "up.0", "up.3", "head"), ("input", 1)),
    "resnext": {
        f"layer{stage}.0.{name}": ("input", units)
        for stage in (1, 2, 3, 4)
        for name, units in (("conv1", 1), ("conv3", 4 * 2**stage), ("downsample.0", 1))
    }
    | {"fc": ("input", 1)},
    "vit": {
        f"encoder.layers.encoder_layer_{block}.{name}": ("input", units)
        for block in (0, 1)
        for name, units in (("self_attention.out_proj", 8), ("mlp.3", 1))
    },
    "convnext": {"features.1.0.block.5": ("input", 1), "features.3.0.block.5": ("input", 1)},
}


@pytest.mark.parametrize(
    "name", telling(PLACES, ["vgg", "gpt2", "llama", "channelwise", "convnext"])
)
def test_gates_are_placed_by_structure(name: str) -> None:
    assert placed(*zoo(name)) == PLACES[name]


def test_what_has_no_gates_says_why() -> None:
    found = reasons(*zoo("resnext"))
    assert found["conv1"] == "it reads the model's input 'x'"
    assert "passes its channels on" in found["layer1.0.conv2"]
    assert list(reasons(*zoo("densenet"))) == ["features.conv0"]
    found = reasons(*zoo("shufflenet"))
    assert "no unit that it reads can vanish alone" in found["stage2.1.branch2.0"]
    assert "divided by aten::" in found["stage2.1.branch2.0"]
    found = reasons(*zoo("gpt2"))
    assert found["lm_head"] == "it shares its weight with 'wte'"
    assert found["h.0.attn.c_attn"].startswith("it reads aten::embedding in 'wte' (zoo.py:")
    found = reasons(*zoo("convnext"))
    assert "aten::layer_norm" in found["features.1.0.block.3"]
    found = reasons(*zoo("vit"))
    assert "aten::add" in found["encoder.layers.encoder_layer_1.self_attention.in_proj"]


class Convs(nn.Module):
    """Three convolutions with something between."""

    def __init__(self, between: Callable[[Tensor], Tensor], norm: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 1) for i, o in ((3, 6), (6, 5), (5, 2)))
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.between(self.norm(self.a(x))))))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Convs(torch.relu), {"a": "output", "b": "output"}),
        # A closed channel would not be zero at its reader: the reader has the gates.
        (Convs(torch.sigmoid), {"b": "input", "c": "input"}),
        (Convs(torch.relu, norm=True), {"b": "input", "c": "input"}),
    ],
)
def test_closed_means_zero(model: nn.Module, expected: dict[str, str]) -> None:
    found = placed(model, torch.randn(1, 3, 4, 4))
    assert {name: gates for name, (gates, _) in found.items()} == expected


def test_readers_of_the_same_units_share_their_gates() -> None:
    model: Any = plain.LinearStream(4, 8, 2).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert placed(model, x) == dict.fromkeys(("first", "second", "head"), ("input", 1))
    assert model.head.log_alpha is model.second.log_alpha
    assert model.first.log_alpha is not model.second.log_alpha
    with torch.no_grad():
        model.head.log_alpha[[1, 2, 3]] = -9.0
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-12)
    assert small.first.out_features == small.second.in_features == 5
    assert small.second.out_features == small.head.in_features == 5


def test_linears_with_gates_of_their_own_on_the_same_units_gather() -> None:
    model: Any = sparsify_(plain.LinearStream(4, 8, 2).double().eval(), gates="input")
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for layer, shut in ((model.first, []), (model.second, [1, 2, 3]), (model.head, [2, 3, 4])):
            layer.log_alpha.fill_(9.0)
            layer.log_alpha[shut] = -9.0
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-12)
    assert small.first.out_features == 6  # without 2 and 3, which neither reads
    assert small.second.layer.out_features == 6
    assert small.second.gather.index.tolist() == [0, 2, 3, 4, 5]
    assert small.head.gather.index.tolist() == [0, 1, 3, 4, 5]


def shared(name: str) -> dict[str, set[str]]:
    """First layer -> all that share its gates, where there are several."""
    layers = gated_layers(sparsify_(zoo(name)[0], example_inputs=zoo(name)[1]))
    found: dict[str, set[str]] = {}
    for layer, owner in gate_owners(layers).items():
        found.setdefault(owner, set()).add(layer)
    return {owner: names for owner, names in found.items() if len(names) > 1}


def test_residual_streams_have_one_set_of_gates() -> None:
    assert shared("resnet18") == {
        "layer1.0.conv1": {"layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0"},
        "layer3.0.conv1": {"layer3.0.conv1", "layer3.0.downsample.0"},
        "layer4.0.conv1": {"layer4.0.conv1", "layer4.0.downsample.0"},
    }


def test_a_squeeze_and_excite_branch_shares_the_gates_of_what_it_scales() -> None:
    block = "features.2.0.block"
    found = shared("efficientnet")
    assert found[f"{block}.2.fc1"] == {f"{block}.2.fc1", f"{block}.3.0"}


def test_readers_of_some_of_the_same_units_have_parts_of_one_set() -> None:
    assert shared("unet") == {"bottom.0": {"bottom.0", "up.0"}}
    block = "features.denseblock3"
    assert shared("densenet")[f"{block}.denselayer1.conv1"] == {
        f"{block}.denselayer1.conv1",
        f"{block}.denselayer2.conv1",
        "features.transition3.conv",
    }


def test_no_part_has_gates_where_one_reader_can_have_none() -> None:
    model, x = zoo("densenet")
    table = sparsify_(model, example_inputs=x, exclude="*denselayer2.conv1", dry_run=True)
    rows = {row.name: row for row in table.layers}
    for name in ("features.denseblock3.denselayer1.conv1", "features.transition3.conv"):
        assert "also read by features.denseblock3.denselayer2.conv1" in rows[name].reason
        assert not rows[name].gates
    assert rows["features.transition2.conv"].gates


class Backwards(nn.Module):
    """Its layers are defined in another order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Conv2d(6, 2, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


def test_units_have_gates_at_one_place() -> None:
    assert placed(Backwards(), torch.randn(1, 3, 4, 4)) == {"last": ("input", 1)}


def test_gates_are_not_shared_with_a_layer_that_has_none() -> None:
    model, x = zoo("resnet18")
    table = sparsify_(model, example_inputs=x, exclude="layer2.0.downsample.0", dry_run=True)
    rows = {row.name: row for row in table.layers}
    assert "also read by" in rows["layer2.0.conv1"].reason
    assert not rows["layer1.0.conv1"].gates
    with pytest.raises(ValueError, match="which share their gates"):
        sparsify_(model, example_inputs=x, density_init={"layer1.0.conv1": 0.5})
    assert not gated_layers(model)


def test_without_structure_each_layer_is_by_itself() -> None:
    table = sparsify_(plain.Partial(), dry_run=True)
    assert "pass example_inputs" in table.note
    assert [row.gates for row in table.layers] == ["output"] * 2 + ["input"] * 4
    table = sparsify_(plain.DataDependent(), example_inputs=torch.rand(2, 6), dry_run=True)
    assert "torch.export refuses the model" in table.note
    assert table.note in str(table)
    assert [row.gates for row in table.layers] == ["input", "input"]
    assert sparsify_(plain.Partial(), gates="weight", dry_run=True).note == ""


def test_a_dry_run_changes_nothing_and_prints() -> None:
    model, x = plain.Partial(), torch.randn(2, 1, 6, 6)
    before = snapshot(model)
    table = sparsify_(model, example_inputs=x, exclude="head", dry_run=True)
    assert snapshot(model) == before
    assert isinstance(table, GateTable)
    assert [row.name for row in table.layers] == ["conv1", "body.0", "fc1"]
    lines = str(table).splitlines()
    assert lines[0].split() == ["layer", "kind", "gates", "units", "each", "number", "reason"]
    assert lines[2].split() == ["body.0", "Conv2d", "input", "1", "4"]
    assert lines[3].split() == ["fc1", "Linear", "input", "4", "5"]
    assert "the model's input 'x'" in lines[1]


def test_where_no_recipe_fits_it_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"gates: got 'auto'; expected .*reads the model's input"):
        sparsify_(model, example_inputs=x)
    assert list(gated_layers(sparsify_(model, example_inputs=x, gates="output"))) == ["0"]
