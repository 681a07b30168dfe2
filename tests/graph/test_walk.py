"""The walk along a graph: its classes, walking again with other gates, and its memory."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from l0fast.graph.calls import Example
from l0fast.graph.capture import Trace, export, is_carrier
from l0fast.graph.sites import Site, find_sites, is_held
from l0fast.graph.tied import Tied
from l0fast.graph.units import Units, narrowed, reshaped
from l0fast.graph.walk import Walk
from tests.helpers.counting import Counting
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO

MODELS = [
    "vgg",
    "resnet50",
    "mobilenet",
    "resnext",
    "densenet",
    "channelwise",
    "shufflenet",
    "unet",
    "vit",
]


@functools.cache
def traced(name: str) -> tuple[Trace, dict[str, Site]]:
    torch.manual_seed(0)
    build, example = ZOO[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
            nn.init.normal_(module.bias)
    args = example()
    trace = export(model, Example.of(args))
    return trace, find_sites(model, trace, {}, {})


def half_closed(sites: dict[str, Site], seed: int) -> dict[str, Tensor]:
    """Of every other layer that makes units, half of the outputs."""
    chance = torch.Generator().manual_seed(seed)
    makers = [name for name, site in sites.items() if not is_carrier(site.layer)]
    return {
        name: torch.rand(len(sites[name].writes), generator=chance) < 0.5
        for name in makers[seed % 2 :: 2]
    }


def untold(layer: nn.Module) -> nn.Module:
    """A carrier whose constants are all NaN."""
    twin: Any = copy.deepcopy(layer)
    for value in (twin._parameters.get("bias"), twin._buffers.get("running_mean")):
        if value is not None:
            value.detach().fill_(torch.nan)
    return twin


def assert_alike(one: Walk, other: Walk) -> None:
    for part in ("classes", "tainted", "restless"):
        assert torch.equal(getattr(one, part), getattr(other, part)), part
    assert one.stops == other.stops
    assert one.sources == other.sources
    assert one.lost == other.lost
    assert one.outputs.keys() == other.outputs.keys()
    assert all(torch.equal(one.outputs[name], other.outputs[name]) for name in one.outputs)
    assert one.inputs.keys() == other.inputs.keys()
    for name, units in one.inputs.items():
        assert (units is None) == (other.inputs[name] is None)
        assert units is None or units.same_as(other.inputs[name])  # type: ignore[arg-type]
    for node in one.trace.nodes:
        mine, theirs = one.units(node), other.units(node)
        assert len(mine) == len(theirs)
        assert all(map(Units.same_as, mine, theirs)), node


@pytest.mark.parametrize("name", telling(MODELS, ["vgg", "shufflenet"]))
def test_walking_again_finds_what_a_new_walk_does(name: str) -> None:
    trace, sites = traced(name)
    first = Walk(trace, sites.values())
    walk = first
    for seed in range(3):  # each from where the last one came to
        writes = half_closed(sites, seed)
        sites = sites | {layer: replace(sites[layer], writes=writes[layer]) for layer in writes}
        walk = walk.again(writes)
        assert_alike(walk, Walk(trace, sites.values()))
    assert_alike(first, Walk(trace, traced(name)[1].values()))  # it is not changed by it


@pytest.mark.parametrize("name", telling(MODELS, ["vgg", "channelwise", "vit"]))
def test_of_carriers_that_are_untold_no_constant_is_known(name: str) -> None:
    trace, sites = traced(name)
    carriers = {layer for layer, site in sites.items() if is_carrier(site.layer)}
    held = {layer for layer, site in sites.items() if is_held(site)}
    writes = half_closed(sites, 0)
    twins = [
        replace(
            site,
            layer=untold(site.layer) if site.name in carriers - held else site.layer,
            writes=writes.get(site.name, site.writes),
        )
        for site in sites.values()
    ]
    walk = Walk(trace, sites.values()).again(writes, carriers)
    assert_alike(walk, Walk(trace, twins, held))
    assert_alike(
        walk.again({layer: sites[layer].writes for layer in writes}, ()),
        Walk(trace, sites.values()),
    )


class Uneven(nn.Module):
    """A closed channel is 0 in one half of what the second layer reads, and 1 in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(torch.cat([y, y + 1], 2))


def test_walking_again_leaves_the_first_walk_as_it_was() -> None:
    trace = export(model := Uneven().eval(), Example.of(torch.randn(1, 1, 3, 3)))
    sites = find_sites(model, trace, {}, {})
    first = Walk(trace, sites.values())
    again = first.again({"a": torch.tensor([True, False, True, True])})
    assert not bool(again.classes[again.made["a"]].any())  # the new tie pins what is read
    assert_alike(first, Walk(trace, sites.values()))


@pytest.mark.parametrize("name", [*MODELS, "gpt2", "bert", "llama"])
def test_tensors_take_memory_only_where_they_vary(name: str) -> None:
    trace, sites = traced(name)
    walk = Walk(trace, sites.values())
    for units in (part for node in walk.values for part in walk.units(node)):
        for values in (units.labels, units.constant):
            needed = narrowed(values).numel()
            sizes = [size for size, step in zip(values.shape, values.stride(), strict=True) if step]
            assert torch.Size(sizes).numel() == needed
            assert values.untyped_storage().nbytes() <= 8 * max(needed, len(walk.classes))


def work_of_a_walk(width: int, blocks: int) -> Counting:
    """What the walk along a ViT with 16 patches takes."""
    model = VisionTransformer(32, 8, blocks, 4, width, 4 * width, num_classes=10)
    trace = export(model.eval(), Example.of(torch.randn(1, 3, 32, 32)))
    sites = find_sites(model, trace, {}, {})
    with Counting() as counting:
        Walk(trace, sites.values())
    return counting


def test_a_walk_takes_work_in_proportion_to_the_units() -> None:
    one, wider, deeper = work_of_a_walk(32, 1), work_of_a_walk(128, 1), work_of_a_walk(32, 4)
    assert wider.work.total() == one.work.total()  # none for each unit
    for larger in (wider, deeper):
        assert larger.elements.total() < 4.1 * one.elements.total()
        # Rows are not sorted: that takes a hundred times as long as the rest of the walk.
        assert not {"unique_dim", "unique_dim_consecutive"} & larger.work.keys()


@pytest.mark.parametrize("seed", range(4))
def test_a_class_is_its_least_unit(seed: int) -> None:
    torch.manual_seed(seed)
    size = 200
    tied = Tied(["a", "b"], torch.arange(size) % 3 - 1, size, {})
    expected = list(range(size))
    for number in (1, 5, 40, 3, 20):
        pairs = torch.randint(0, size, (2, number))
        if number == 40:  # a chain, whose ends come first
            pairs[0], pairs[1] = torch.arange(60, 100), torch.arange(61, 101)
            pairs = pairs[:, torch.randperm(40)]
        tied.tie(pairs[0], pairs[1], "why")
        for one, other in pairs.T.tolist():
            low, high = sorted((expected[one], expected[other]))
            expected = [low if label == high else label for label in expected]
    assert tied._least().tolist() == expected


def test_who_makes_what_is_tied_is_told_why() -> None:
    tied = Tied(["a", "b", "c"], torch.tensor([-1, 0, 0, 1, 2]), 5, {})
    tied.tie(torch.tensor([1, 3]), torch.tensor([2, 3]), "first")
    tied.pin(torch.tensor([0, 4]), "second")
    tied.pin(torch.tensor([4]), "second")
    assert [list(reasons) for reasons in tied.stops.values()] == [["first"], [], ["second"]]
    assert [list(reasons) for reasons in tied.pins.values()] == [[], [], ["second"]]
    assert tied._least().tolist() == [0, 1, 1, 3, 0]


def test_of_reasons_alike_the_first_is_told_and_what_pins_counts_most() -> None:
    tied = Tied(["a", "b", "c"], torch.tensor([-1, 0, 0, 1, 2]), 5, {})
    for first, second, name in ((1, 2, "x"), (2, 3, "y"), (3, 4, "z")):
        tied.tie(torch.tensor([first]), torch.tensor([second]), f"the groups of {name!r}")
    labels = torch.tensor([1, 2])
    assert tied.tied_by(labels) == "the groups of 'x' and 1 more"
    tied.pin(torch.tensor([2]), "the model's output")
    tied.classes = tied._least()
    assert tied.reasons(labels) == (
        "the model's output, tied together by the groups of 'x' and 1 more"
    )


@pytest.mark.parametrize(
    ("before", "varies", "after"),
    [
        ((2, 5, 3, 4), (2, 3), (2, 5, 12)),
        ((2, 5, 3, 4), (2,), (2, 5, 12)),
        ((2, 5, 12), (2,), (10, 3, 2, 2)),
        ((2, 6, 4), (1,), (4, 3, 4)),
        ((2, 6, 4), (0, 2), (12, 4, 1)),
        ((1, 6, 1, 4), (1,), (6, 1, 4)),
        ((6, 4), (), (3, 8)),
        ((6, 4), (0,), (3, 8)),
        ((), (), (1, 1)),
        ((1,), (), ()),
        ((0, 3), (), (3, 0)),
    ],
)
def test_a_reshape_copies_only_what_varies(
    before: tuple[int, ...], varies: tuple[int, ...], after: tuple[int, ...]
) -> None:
    sizes = [size if dim in varies else 1 for dim, size in enumerate(before)]
    values = torch.arange(torch.Size(sizes).numel()).view(sizes).expand(before)
    found = reshaped(values, after)
    assert torch.equal(found, values.reshape(after))
    if before[:2] == (2, 5):
        assert found.stride(0) == 0
