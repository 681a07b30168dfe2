"""The proof of a pruned model: what it compares, and that it sees what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.graph.capture import is_carrier
from l0fast.graph.compare import values_of
from l0fast.graph.structure import structure_of
from l0fast.layers.handle import gated_layers
from l0fast.pruning import probes
from l0fast.pruning.draft import new_draft
from l0fast.pruning.edits import Edit
from l0fast.pruning.gate_values import GateValues
from l0fast.pruning.plan import make_plan
from l0fast.pruning.precision import widened
from l0fast.pruning.proof import Proof
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO


def half_of_each_closed(model: nn.Module, example: Any) -> nn.Module:
    """Gates on a model, half of each layer's closed."""
    sparsify_(model.double().eval(), example_inputs=example)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(5.0)
            closed = torch.randperm(len(layer.log_alpha), generator=chance)
            layer.log_alpha[closed[: len(closed) // 2]] = -9.0
    return model


# --- what is compared ---------------------------------------------------------------------------


class Slots:
    __slots__ = ("hidden", "missing")

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


@dataclass
class Fields:
    hidden: Tensor
    note: str = "a note"


class Named(NamedTuple):
    hidden: Tensor
    count: int


KINDS: dict[str, Any] = {
    "tensor": lambda y: y,
    "list": lambda y: [None, {"y": (y,)}],
    "named tuple": lambda y: Named(y, 3),
    "dataclass": Fields,
    "slots": Slots,
    "namespace": lambda y: SimpleNamespace(inner=SimpleNamespace(y=y)),
    "distribution": lambda y: torch.distributions.Normal(y, torch.ones_like(y)),
    "generator": lambda y: (part for part in y),
    "number": lambda y: y.sum().item(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_found_in_whatever_a_model_gives(kind: str) -> None:
    y = torch.arange(6.0).view(2, 3)
    found = sum(float(value.sum()) for value in values_of(KINDS[kind](y)))
    expected = {"named tuple": 15.0 + 3, "distribution": 15.0 + 6 + 2 + 3}.get(kind, 15.0)
    assert found == expected


def test_a_cycle_and_a_cache_hold_no_values() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys = torch.ones(2)

    loop = SimpleNamespace(cache=Cache(), y=torch.ones(1))
    loop.loop = loop
    assert [float(value) for value in values_of(loop)] == [1.0]


class Giver(nn.Module):
    """An autoencoder that reads a weight past its layer's call, and gives an object."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.before, self.enc = nn.Linear(12, 20), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.enc(torch.relu(self.before(x))))
        return KINDS[self.kind](F.linear(h, self.enc.weight.t()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "number"])
def test_a_pruned_model_gives_the_same_object(kind: str) -> None:
    x = torch.randn(4, 12, dtype=torch.float64)
    model = half_of_each_closed(Giver(kind), x)
    with torch.no_grad():
        got, expected = (values_of(one(x)) for one in (prune(model, x), model))
    assert len(expected) > 0
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class Nothing(nn.Module):
    """Gives no number that is finite, and has no layer that does."""

    def __init__(self, factor: float | None) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(6, 4), factor

    def forward(self, x: Tensor) -> Any:
        if self.factor is None:
            return "a text"
        return F.linear(x, self.layer.weight) * self.factor


@pytest.mark.parametrize(("factor", "kind"), [(None, "str"), (torch.nan, "Tensor")])
def test_a_model_that_gives_nothing_to_compare_is_refused(factor: float | None, kind: str) -> None:
    x = torch.randn(2, 6)
    model = sparsify_(Nothing(factor), gates="input")
    with pytest.raises(
        ValueError, match=f"whose {kind} output has no finite number.*finite numbers"
    ):
        prune(model, x)


@pytest.mark.parametrize("name", ["lenet", "llama", "bert", "unet"])
def test_the_report_says_what_was_compared(name: str) -> None:
    build, example = ZOO[name]
    x = widened(Example.of(example()), torch.float64).args
    small: Any = prune(half_of_each_closed(build(), x), x)
    report = small.report
    expected = {
        "lenet": ["the example", "noise in a batch of 3"],
        "llama": [
            "the example",
            "the example in a batch of 3",
            "the example with a length of 24",
        ],
    }
    assert report.compared == expected.get(name, report.compared)
    assert len(report.compared) == 3 or name == "lenet"


# --- what it sees -------------------------------------------------------------------------------


class Case:
    """A gated model, its proof, and a plan that holds."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        layers = gated_layers(model)
        kept = {name: layer.log_alpha.detach() > 0 for name, layer in layers.items()}
        values, called = GateValues(layers, kept), Example.of(example)
        structure = structure_of(model, called)
        self.proof = Proof(model, values, called)
        self.draft = new_draft(model, values, structure)
        self.plan = make_plan(self.draft, structure, self.proof.check)

    def fails(self, edits: list[Edit], constants: Any = None) -> bool:
        """Whether something else than the plan is refused."""
        self.draft.make_smaller(edits, self.plan.patches, constants or self.plan.constants)
        return bool(self.proof.check(self.draft).failure)

    def wrong(self, side: str) -> list[list[Edit]]:
        """The plan with one edit that keeps the units beside those that it should, for each."""
        found: list[list[Edit]] = []
        for place, edit in enumerate(self.plan.edits):
            kept, size = getattr(edit, side), edit.size[side == "outputs"]
            layer = self.draft.source.get_submodule(edit.name)
            if kept is None or (side == "inputs" and is_carrier(layer)):
                continue  # what passes its channels on has one list of them
            beside = tuple(sorted((one + 1) % size for one in kept))
            if beside != kept:
                changed = replace(edit, **{side: beside})
                found.append([*self.plan.edits[:place], changed, *self.plan.edits[place + 1 :]])
        return found


FAMILIES = ["mlp ReLU", "lenet", "vgg", "resnet18", "mobilenet", "unet", "vit", "bert", "llama"]


@pytest.mark.parametrize("name", telling(FAMILIES, ["mlp ReLU", "vgg", "llama"]))
def test_units_taken_for_others_are_seen_in_every_family(name: str) -> None:
    torch.manual_seed(0)
    build, example = ZOO[name]
    x = widened(Example.of(example()), torch.float64).args
    case = Case(half_of_each_closed(build(), x), x)
    assert not case.fails(list(case.plan.edits))
    wrong = [edits for side in ("inputs", "outputs") for edits in case.wrong(side)]
    assert len(wrong) > 1
    for edits in wrong[:: max(1, len(wrong) // 12)]:
        assert case.fails(edits)


class Hidden(nn.Module):
    """What its last layer reads hardly reaches the output, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.full((8,), 1e-12 if how == "scale" else 1.0))
        self.head = nn.Linear(8, 3)
        self.how = how
        if how == "head":
            nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = x.sum(-1, keepdim=True) + self.scale * self.b(torch.relu(self.a(x)))
        y = self.head(h)
        return y.argmax(-1) if self.how == "argmax" else y


@pytest.mark.parametrize("how", ["plain", "head", "scale", "argmax"])
def test_what_the_output_hides_is_seen(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = sparsify_(Hidden(how).double(), gates="input", include=["b"]).eval()
    with torch.no_grad():
        model.b.log_alpha[::2] = -9.0  # type: ignore[operator, union-attr, index]
    case = Case(model, x)
    for edits in (*case.wrong("inputs"), *case.wrong("outputs")):
        assert case.fails(edits)


def test_parameters_are_perturbed_and_come_back() -> None:
    norms = nn.LayerNorm(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    model: Any = nn.Sequential(nn.Linear(4, 4), *norms, nn.PReLU())
    nn.init.zeros_(model[0].weight)
    model[3].running_mean.fill_(1.0)  # a closed unit leaves a constant that its weight is part of
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: value.data_ptr() for name, value in model.named_parameters()}
    with probes.perturbed(model):
        changed = {n for n, value in model.state_dict().items() if not value.equal(before[n])}
        assert changed == {"0.weight", "1.weight", "1.bias", "2.weight", "4.weight"}
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert own == {name: value.data_ptr() for name, value in model.named_parameters()}


# --- sizes that the example does not show -------------------------------------------------------


class Tokens(nn.Module):
    """Two attributes hold the same size: one is a width, the other is a length."""

    def __init__(self) -> None:
        super().__init__()
        self.max_len = self.width = 48
        self.embed = nn.Embedding(10, 16)
        self.up, self.down, self.head = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids[:, : self.max_len])
        h = torch.relu(self.up(x)).view(-1, x.shape[1], self.width)
        return self.head(x + self.down(h)).mean(1)


def test_a_length_is_not_taken_for_a_width() -> None:
    torch.manual_seed(0)
    model = half_of_each_closed(Tokens(), torch.randint(0, 10, (2, 16)))
    small: Any = prune(model, torch.randint(0, 10, (2, 16)))
    assert (small.max_len, small.width) == (48, 24)
    longer = torch.randint(0, 10, (2, 60))
    torch.testing.assert_close(small(longer), model(longer), rtol=1e-12, atol=1e-12)


def test_a_wrong_length_is_seen_on_longer_sequences() -> None:
    model = half_of_each_closed(Tokens(), x := torch.randint(0, 10, (2, 16)))
    case = Case(model, x)
    (patch,) = case.plan.patches
    wrong = [patch, replace(patch, attribute="max_len")]
    case.draft.make_smaller(case.plan.edits, wrong, case.plan.constants)
    outcome = case.proof.check(case.draft)
    assert "on the example with a length of 64" in outcome.failure


class Checked(nn.Module):
    """A block in whose forward a size is written out, but in no view."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.width = how, 16
        self.decoy = 16 if how == "attribute" else 0
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "check":
            assert x.shape[-1] == 16
        elif self.how == "attribute":
            assert x.shape[-1] == self.width
            x = x * self.decoy
        else:
            x = x / x.shape[-1]
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("how", ["check", "mean"])
def test_a_size_outside_of_views_keeps_what_its_module_reads_and_nothing_else(how: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, dtype=torch.float64)
    around = [nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), Checked(how)]
    model = half_of_each_closed(
        nn.Sequential(*around, nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), x
    )
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small.report.tier != "each layer by itself"
    status = {row["name"]: row["status"] for row in small.report.sites}
    assert status["7"] == "removed"
    assert small[5].layer.out_features == 16  # it gathers, but makes only what is read
    assert status["2"] == "compacted"


class Cache:
    """What a decoder gives for its next step."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Decoder(nn.Module):
    """One head of attention in four, and a cache beside the output."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        parts = self.qkv(x).unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        return {"y": x + self.out(y), "past": Cache(parts[1])}


def test_heads_go_though_a_cache_is_given_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    model = half_of_each_closed(Decoder(), x)
    assert gated_layers(model)["out"].units == 2
    small: Any = prune(model, x)
    assert small.report.tier == "merged"
    assert small.out.in_features == 4
    assert small(x)["past"].keys.shape == (2, 2, 5, 2)
    torch.testing.assert_close(small(x)["y"], model(x)["y"], rtol=1e-12, atol=1e-12)


def test_what_is_written_into_a_layers_output_later_is_not_taken_for_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64)
    layers = nn.Linear(6, 12), nn.ReLU(inplace=True), nn.Linear(12, 8), nn.ReLU(inplace=True)
    model = half_of_each_closed(nn.Sequential(*layers, nn.Linear(8, 3)), x)
    assert prune(model, x).report.tier == "merged"  # type: ignore[union-attr]


def test_an_attribute_that_is_checked_follows() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8, dtype=torch.float64)
    checked = Checked("attribute")
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), checked)
    model = half_of_each_closed(nn.Sequential(*model, nn.Linear(16, 4)), x)
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    assert small.report.tier == "merged"
    assert (small[4].width, small[4].decoy) == (8, 16)
