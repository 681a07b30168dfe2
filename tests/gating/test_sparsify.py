"""The retrofit: which layers get gates, what stays as it was, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast.gating.param_groups import param_groups
from l0fast.gating.sparsify import sparsify_
from l0fast.layers.conv import L0Conv1d, L0Conv2d, L0Conv3d
from l0fast.layers.handle import gated_layers
from l0fast.layers.linear import L0Linear
from l0fast.layers.sampling import draw_gates
from l0fast.maths.hard_concrete import HardConcrete
from tests.helpers.gated import snapshot
from tests.helpers.plain_models import Partial

CONVS = ["conv1", "body.0"]
LINEARS = ["fc1", "head", "unused", "extra"]
NAMES = CONVS + LINEARS


def gates_of(model: nn.Module) -> dict[str, str]:
    return {name: layer.gates for name, layer in gated_layers(model).items()}


@pytest.mark.parametrize("gates", ["auto", "input", "output", "weight"])
def test_gates_go_where_they_are_asked_for(gates: str) -> None:
    model = Partial()
    parameters = dict(model.named_parameters())
    assert sparsify_(model, gates=gates) is model
    conv, linear = ("output", "input") if gates == "auto" else (gates, gates)
    assert gates_of(model) == {**dict.fromkeys(CONVS, conv), **dict.fromkeys(LINEARS, linear)}
    # An optimizer that was built before still holds the model's parameters.
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert set(after) - set(parameters) == {f"{name}.log_alpha" for name in NAMES}
    assert list(model._forward_pre_hooks.values()) == [draw_gates]


def test_every_kind_of_layer_has_its_drop_in() -> None:
    model = nn.ModuleList(
        [nn.Linear(2, 2), nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ReLU()]
    )
    sparsify_(model)
    assert [type(layer) for layer in model] == [L0Linear, L0Conv1d, L0Conv2d, L0Conv3d, nn.ReLU]


class MyLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize(
    "other", [MyLinear(3, 3), nn.Bilinear(2, 2, 2), nn.LazyConvTranspose2d(1, 1), nn.LazyLinear(3)]
)
def test_other_classes_are_left_alone(other: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), other)
    sparsify_(model)
    assert model[1] is other
    assert list(gated_layers(model)) == ["0"]


SELECTIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "name": ({"include": "fc1"}, ["fc1"]),
    "glob": ({"include": "*1"}, ["conv1", "fc1"]),
    "several": ({"include": ["head", "body.*"]}, ["body.0", "head"]),
    "iterator": ({"include": iter(["head", "fc?"])}, ["fc1", "head"]),
    "predicate": ({"include": lambda _, layer: layer.bias.numel() > 5}, ["fc1", "unused"]),
    "exclude": ({"exclude": ["*e*"]}, ["conv1", "body.0", "fc1"]),
    "exclude predicate": ({"exclude": lambda name, _: name != "fc1"}, ["fc1"]),
    "both": ({"include": "*1", "exclude": "conv?"}, ["fc1"]),
    "nothing left": ({"exclude": ["[!F]*"], "include": lambda *_: True}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTIONS)
def test_include_and_exclude(name: str) -> None:
    options, expected = SELECTIONS[name]
    model = Partial()
    if not expected:
        with pytest.raises(ValueError, match="model: got 'Partial'; expected a model with a"):
            sparsify_(model, **options)
    else:
        assert list(gates_of(sparsify_(model, **options))) == expected


@pytest.mark.parametrize(
    ("inputs", "unreached"),
    [
        (torch.randn(2, 1, 6, 6), {"unused", "extra"}),
        ((torch.randn(2, 1, 6, 6), True), {"unused"}),
        ([torch.randn(2, 1, 6, 6), False], {"unused", "extra"}),
    ],
    ids=["tensor", "tuple", "list"],
)
def test_example_inputs_leave_out_what_never_runs(inputs: Any, unreached: set[str]) -> None:
    model = Partial()
    model.norm.eval()
    before = snapshot(model)
    sparsify_(model, example_inputs=inputs)
    # Behind conv1 is a norm: the gates on its channels are on the inputs of body.0.
    assert set(gates_of(model)) == set(NAMES) - unreached - {"conv1"}
    assert gates_of(model)["body.0"] == "input"
    assert not model.norm.training
    assert model.training
    values = {row[0]: row[-1] for row in before}
    assert all(
        value.double().sum().item() == values[name]
        for name, value in model.state_dict().items()
        if not name.endswith((".log_alpha", "._extra_state"))
    )
    assert all(not layer._forward_pre_hooks for layer in gated_layers(model).values())


def test_fused_attention_is_left_alone() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleDict({"e": encoder, "d": decoder, "a": nn.MultiheadAttention(8, 2)})
    model["head"] = nn.Linear(8, 3)
    sparsify_(model)
    # A decoder layer has no fused forward around its own Linears.
    assert list(gates_of(model)) == ["d.linear1", "d.linear2", "head"]
    with pytest.raises(ValueError, match="expected a model with a Linear or conv layer to gate"):
        sparsify_(nn.Sequential(copy.deepcopy(encoder)))


def test_a_shared_layer_is_replaced_once_everywhere() -> None:
    shared = nn.Linear(4, 4)
    inner = nn.Sequential(shared, nn.ReLU())
    model = nn.ModuleDict({"a": shared, "b": inner, "c": inner, "d": shared})
    sparsify_(model)
    layer = model["a"]
    assert isinstance(layer, L0Linear)
    assert model["d"] is layer
    assert inner[0] is layer
    assert list(gated_layers(model)) == ["a"]
    assert len(param_groups(model, 1.0)[1]["params"]) == 1


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    model["head"].weight = model["embedding"].weight  # type: ignore[assignment]
    sparsify_(model)
    assert model["head"].weight is model["embedding"].weight


@pytest.mark.parametrize("gates", ["auto", "input", "output", "weight"])
@pytest.mark.parametrize("noise", ["batch", "example"])
def test_density_one_leaves_evaluation_as_it_was(gates: str, noise: str) -> None:
    if (gates, noise) == ("weight", "example"):
        noise = "batch"
    model, x = Partial().eval(), torch.randn(4, 1, 6, 6)
    expected = model(x)
    sparsify_(model, gates=gates, density_init=1.0, noise=noise)
    assert torch.equal(model(x), expected)  # to the bit


def test_initial_densities() -> None:
    def densities(**options: Any) -> dict[str, float]:
        layers = gated_layers(sparsify_(Partial(), **options))
        return {name: layer.open_probability().mean().item() for name, layer in layers.items()}

    def approx(rest: float = 0.9, **named: float) -> Any:
        return pytest.approx({**dict.fromkeys(NAMES, rest), **named}, rel=1e-4)

    assert densities() == approx()
    assert densities(density_init=0.3) == approx(0.3)
    assert densities(density_init={"fc1": 0.5, "*ead": 0.2}) == approx(fc1=0.5, head=0.2)
    # A later pattern overrides an earlier one.
    assert densities(density_init={"*": 0.5, "conv1": 1}, include=["conv1", "fc1"]) == (
        pytest.approx({"conv1": 1.0, "fc1": 0.5}, rel=1e-4)
    )
    torch.manual_seed(0)
    published = densities(droprate_init={"fc1": 0.5})
    assert published == pytest.approx({**dict.fromkeys(NAMES, 0.9), "fc1": 0.832}, abs=3e-3)


def test_distribution_and_noise_reach_every_layer() -> None:
    distribution = HardConcrete(temperature=0.5, bound=3.0)
    layers = gated_layers(sparsify_(Partial(), distribution=distribution, noise="example"))
    assert {layer.distribution for layer in layers.values()} == {distribution}
    assert {layer.noise for layer in layers.values()} == {"example"}


def test_a_model_may_be_given_gates_in_parts() -> None:
    model = sparsify_(Partial(), include="fc1", density_init=0.5)
    first = model.fc1
    sparsify_(model, include="conv1", gates="input")
    assert model.fc1 is first
    assert gates_of(model) == {"conv1": "input", "fc1": "input"}
    assert list(model._forward_pre_hooks.values()) == [draw_gates]
    sparsify_(model, exclude="*")  # nothing left to add
    assert gates_of(model) == {"conv1": "input", "fc1": "input"}


BAD: dict[str, dict[str, Any]] = {
    "unknown gates": {"gates": "both"},
    "unknown include": {"include": "fc9"},
    "unknown exclude": {"exclude": ["fc1", "fc9"]},
    "all excluded": {"exclude": "*"},
    "unknown density_init": {"density_init": {"fc9": 0.5}},
    "density_init of a layer that is left out": {"density_init": {"head": 0.5}, "exclude": "head"},
    "zero": {"density_init": 0},
    "zero for one layer": {"density_init": {"*": 0.5, "extra": 0}},
    "too much for the last": {"density_init": {"extra": 1.5}},
    "droprate of one": {"droprate_init": {"extra": 1.0}},
    "both initialisations": {"density_init": 0.5, "droprate_init": 0.5},
    "noise": {"noise": "examples"},
    "noise of single weights": {"noise": "example", "gates": "weight"},
    "distribution": {"distribution": "hard"},
    "example_inputs": {"example_inputs": torch.randn(2, 3)},
    "predicate": {"include": lambda name, _: {}[name]},
}


@pytest.mark.parametrize("name", BAD)
def test_a_refusal_leaves_the_model_untouched(name: str) -> None:
    model = Partial()
    model.body.eval()
    before = snapshot(model)
    with pytest.raises(
        (ValueError, TypeError, KeyError, RuntimeError), match=r"expected|conv1|conv2d"
    ):
        sparsify_(model, **BAD[name])
    assert snapshot(model) == before


def test_a_single_layer_is_refused_with_the_way_out() -> None:
    line = (
        "model: got 'a single Conv2d'; expected a model that contains layers.*L0Conv2d.from_dense"
    )
    with pytest.raises(ValueError, match=line):
        sparsify_(nn.Conv2d(1, 1, 1))


def test_param_groups() -> None:
    model = sparsify_(Partial(), include=["fc1", "head"])
    weights, gates = param_groups(model, 0.1, 0.2, weight_decay=0.3)
    assert [id(p) for p in gates["params"]] == [id(model.fc1.log_alpha), id(model.head.log_alpha)]
    others = [id(p) for name, p in model.named_parameters() if "log_alpha" not in name]
    assert [id(p) for p in weights["params"]] == others
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 0.3)
    assert (gates["lr"], gates["weight_decay"]) == (0.2, 0.0)
    assert param_groups(model, 0.1)[1]["lr"] == 0.1
    assert param_groups(model, 0.1, steps=500)[1]["lr"] == pytest.approx(0.06)
    assert param_groups(model, 0.1, 0.2, steps=500)[1]["lr"] == 0.2
    with pytest.raises(ValueError, match=r"^steps: got 0; expected a whole number >= 1"):
        param_groups(model, 0.1, steps=0)
    torch.optim.SGD(param_groups(model, 0.1))


class Sorted(nn.Module):
    """Whatever is in front of a sort must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).mean((2, 3))
        return self.b(h.sort(-1).values)


def test_a_refusal_names_the_op_and_the_line_that_stops_the_units() -> None:
    with pytest.raises(
        ValueError, match=r"units can be removed \('b': .*aten::sort \(test_sparsify\.py:\d+"
    ):
        sparsify_(Sorted(), example_inputs=torch.randn(2, 3, 4, 4))
