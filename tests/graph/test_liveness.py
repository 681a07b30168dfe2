"""What is read of a model's units: what vanishes, what stays, and what is named for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.graph.capture import export
from l0fast.graph.channels import RULES
from l0fast.graph.liveness import Liveness, local_extents
from l0fast.graph.sites import Site
from l0fast.graph.views import sizes_in
from l0fast.graph.walk import Walk
from l0fast.layers.handle import gated_layers
from tests.helpers.thinned import thinned_product


class Functional(nn.Module):
    """Three layers and a function of them: the first makes 6 channels that others read."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], conv: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Conv2d(3, 6, 3) if conv else nn.Linear(3, 6)
        self.b = nn.Conv2d(6, 4, 1) if conv else nn.Linear(6, 4)
        self.c = nn.Conv2d(6, 4, 1) if conv else nn.Linear(6, 4)
        self.inner = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


def look(
    forward: Callable[[Any, Tensor], Tensor],
    conv: bool = False,
    rigid: bool = False,
    fixed: str = "",
    **gates: dict[str, list[int]],
) -> Any:
    """The extents of a Functional; b={"reads": [...]} names the units that gates leave open."""
    model = Functional(forward, conv).eval()
    x = torch.randn(2, 3, 5, 5) if conv else torch.randn(2, 3)
    sites: list[Site] = []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            masks = {}
            for side, size in (("reads", layer.weight.shape[1]), ("writes", layer.weight.shape[0])):
                masks[side] = torch.ones(size, dtype=torch.bool)
                opened = gates.get(name, {}).get(side)
                if opened is not None:
                    masks[side] = torch.zeros(size, dtype=torch.bool)
                    masks[side][opened] = True
            sites.append(Site(name, layer, **masks, fixed=fixed if name == "b" else ""))
    return Liveness(Walk(export(model, Example.of(x)), sites)).extents([""] if rigid else [])


def units(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


def test_a_channel_goes_if_nobody_reads_it() -> None:
    found = look(lambda net, x: net.b(torch.sigmoid(net.a(x))), b={"reads": [1, 4]})
    assert units(found["a"].leaves) == units(found["a"].rows) == [1, 4]
    assert units(found["b"].arrives) == units(found["b"].columns) == [1, 4]
    assert found["b"].columns.shape == (6,)


def test_a_channel_stays_if_one_of_two_reads_it() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.a(x))
        return torch.cat([net.b(y), net.c(y.tanh())], 1)

    found = look(forward, b={"reads": [1, 4]}, c={"reads": [0, 4]})
    assert units(found["a"].leaves) == [0, 1, 4]
    for name, columns in (("b", [1, 4]), ("c", [0, 4])):
        assert units(found[name].arrives) == [0, 1, 4]  # each gathers its own of the three
        assert units(found[name].columns) == columns
        assert found[name].stops == ["the model's output"]


def test_a_zero_channel_goes_where_it_is_still_zero() -> None:
    zero = look(lambda net, x: net.b(torch.relu(net.a(x))), a={"writes": [0, 5]})
    assert units(zero["a"].leaves) == units(zero["b"].columns) == [0, 5]
    half = look(lambda net, x: net.b(torch.sigmoid(net.a(x))), a={"writes": [0, 5]})
    assert units(half["a"].rows) == [0, 5]  # computed
    assert units(half["a"].leaves) == [0, 1, 2, 3, 4, 5]  # and there, as zeros, for the sigmoid
    assert half["b"].columns.all()


def test_a_constant_that_becomes_zero_again() -> None:
    found = look(lambda net, x: net.b(torch.sigmoid(net.a(x)) - 0.5), a={"writes": [0, 5]})
    assert units(found["a"].leaves) == [0, 5]


def test_what_is_written_in_place_is_no_longer_zero() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        torch.sigmoid_(y.view(-1, 6))  # y itself changes, though its node does not
        return net.b(y)

    found = look(forward, a={"writes": [0, 5]})
    assert found["b"].columns.all()
    assert found["a"].leaves.all()


@pytest.mark.parametrize(
    ("write", "columns"),
    [
        (lambda part: part.add_(1.0), [0, 2, 3, 5]),
        (lambda part: part.fill_(1.0), [0, 1, 2, 3, 4, 5]),  # not in the table: nothing is sure
        (lambda part: part.as_strided((2, 2), (6, 1)).add_(1.0), [0, 1, 2, 3, 4, 5]),
        (lambda part: part.as_strided((2, 2), (6, 1)).mul_(2.0), [0, 5]),
    ],
)
def test_what_is_written_into_a_part_is_no_longer_zero(
    write: Callable[[Tensor], Any], columns: list[int]
) -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        write(y[:, 2:4])
        return net.b(y)

    found = look(forward, a={"writes": [0, 5]})
    assert units(found["b"].columns) == columns
    assert {0, *columns, 5} <= set(units(found["a"].leaves))


@pytest.mark.parametrize(
    ("forward", "stop"),
    [
        (lambda net, x: net.b(net.a(x).roll(1, -1)), "aten::roll"),
        (lambda net, x: net.b(net.a(x) + net.a.bias), "aten::add"),
        (lambda net, x: net.b(net.a(x)) + net.a(x).sum(), "aten::add"),
        (lambda net, x: torch.cat([net.b(net.a(x)), x], 1), ""),
    ],
)
def test_what_stops_is_named(forward: Callable[..., Tensor], stop: str) -> None:
    found = look(forward, b={"reads": [1, 4]})
    if not stop:
        assert units(found["a"].leaves) == [1, 4]
        return
    assert found["a"].leaves.all()
    assert found["a"].stops[0].startswith(stop)
    assert units(found["b"].columns) == [1, 4]
    assert found["b"].arrives.all()


def test_the_output_is_read() -> None:
    found = look(lambda net, x: torch.relu(net.a(x)), a={"writes": [2]})
    assert units(found["a"].rows) == [2]
    assert found["a"].leaves.all()
    assert found["a"].stops == ["the model's output"]


def test_a_fixed_reader_reads_everything() -> None:
    found = look(lambda net, x: net.b(net.a(x)), fixed="so", b={"reads": [1]}, a={"writes": [1, 2]})
    assert found["a"].leaves.all()
    assert found["a"].stops == ["'b', which is kept as it is (so)"]
    assert found["b"].arrives.all()


def test_a_reader_called_twice_has_one_set_of_columns() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y) + net.b(y.relu())

    found = look(forward, b={"reads": [1]}, a={"writes": [1, 2]})
    assert units(found["a"].leaves) == units(found["b"].arrives) == [1]
    assert units(found["b"].columns) == [1]


def test_a_reader_that_is_called_on_what_must_stay_reads_everything() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        return net.b(y) + net.b(y.roll(1, 0).sort(-1).values)

    found = look(forward, b={"reads": [1]}, a={"writes": [1, 2]})
    assert found["a"].leaves.all()
    assert found["a"].stops[0].startswith("aten::sort")
    assert found["b"].arrives.all()
    assert units(found["b"].columns) == [1]


def test_a_reader_along_another_dimension_reads_everything() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(net.a(x.expand(6, 2, 3)).transpose(0, -1))

    found = look(forward, a={"writes": [0, 5]}, b={"reads": [1]})
    assert found["a"].leaves.all()
    assert found["a"].stops == ["'b', along another dimension"]
    assert units(found["b"].columns) == [1]
    assert found["b"].arrives.all()


def test_writing_in_place_where_zeros_stay_zeros_is_harmless() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        torch.relu_(x.add(x))
        return net.b(net.a(x).relu_())

    found = look(forward, a={"writes": [0, 5]})
    assert units(found["b"].columns) == [0, 5]


def test_a_written_size_needs_the_units_but_not_their_values() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(net.a(x).reshape(-1, 6).relu())

    assert units(look(forward, b={"reads": [3]})["a"].leaves) == [3]
    found = look(forward, rigid=True, b={"reads": [3]})
    assert found["a"].leaves.all()
    assert units(found["a"].rows) == [3]  # the others are zeros that nobody looks at
    assert units(found["b"].columns) == [3]
    assert found["b"].arrives.all()
    assert [stop.partition(" ")[0] for stop in found["a"].stops] == ["aten::reshape"]


def test_what_lies_in_a_slice_with_others_is_told_by_the_slice() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        one, other = net.a(x).view(2, 2, 3).unbind(1)  # of 3 columns each
        return net.b(torch.cat([one, other], 1))

    found = look(forward, b={"reads": [0, 4]})  # column 0 of the one, and 1 of the other
    assert units(found["a"].leaves) == [0, 1, 3, 4]
    assert [stop.partition(" ")[0] for stop in found["a"].stops] == ["aten::view"]


def test_a_sum_ties_what_it_adds() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(net.a(x) + net.second(x).sigmoid()) + net.c(net.a.weight.new_ones(2, 6))

    model: Any = Functional(forward)
    model.second = nn.Linear(3, 6)
    reads = torch.tensor([False, True, False, False, True, False])
    sites = [Site("a", model.a, torch.ones(3).bool(), ~reads)]
    sites += [Site("second", model.second, torch.ones(3).bool(), torch.ones(6).bool())]
    sites += [Site(n, getattr(model, n), reads, torch.ones(4).bool()) for n in "bc"]
    found = Liveness(Walk(export(model.eval(), Example.of(torch.randn(2, 3))), sites)).extents()
    assert units(found["a"].leaves) == units(found["second"].rows) == [0, 1, 4]
    assert units(found["a"].rows) == [0]  # its own gates close the two, but it keeps a unit
    assert units(found["b"].columns) == [1, 4]


def test_what_is_left_of_a_tensor_is_whole_slices() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x).unflatten(1, (2, 3)).transpose(1, 2).flatten(1)  # 0 3 1 4 2 5
        return net.b(y)

    # 1 and 5 are read: of the 2 x 3 units, the slices that hold them are both rows, two columns.
    found = look(forward, b={"reads": [2, 5]})
    assert units(found["a"].leaves) == [1, 2, 4, 5]
    assert units(found["a"].rows) == [1, 5]


def test_an_empty_tensor_has_nothing_to_lose() -> None:
    """As where a rotary embedding turns all features, and those that it does not turn are none."""

    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x).unflatten(1, (2, 3))
        return net.b(torch.cat([y[..., :3].relu(), y[..., 3:]], -1).flatten(1))

    reads = torch.tensor([True, True, True, False, False, False])
    model = Functional(forward).eval()
    sites = [Site("a", model.a, torch.ones(3).bool(), torch.ones(6).bool())]
    sites.append(Site("b", model.b, reads, torch.ones(4).bool()))
    live = Liveness(Walk(export(model, Example.of(torch.randn(2, 3))), sites))
    assert live.shrinking() == [""]
    assert sizes_in(live, "", live.present()) == {
        (6, 3),
        (2, 1),
    }  # what is empty along one dimension keeps the others


def test_each_layer_by_itself() -> None:
    layer = nn.Linear(3, 4)
    reads, writes = torch.tensor([True, False, True]), torch.tensor([True, True, False, True])
    free = local_extents([Site("a", layer, reads, writes)])["a"]
    assert free.arrives.all()
    assert free.leaves.all()
    assert torch.equal(free.columns, reads)
    assert torch.equal(free.rows, writes)
    full = local_extents([Site("a", layer, reads, writes, "so", local=False)])["a"]
    assert full.columns.all()
    assert full.rows.all()


def test_a_rule_that_fails_loses_its_op_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise IndexError("a form of the op\nthat it does not know")

    def forward(net: Any, x: Tensor) -> Tensor:
        return net.b(net.a(x).tanh_()) + net.third(net.second(x).relu())

    model: Any = Functional(forward).eval()
    model.second, model.third = nn.Linear(3, 6), nn.Linear(6, 4)
    monkeypatch.setitem(RULES, "aten::tanh_", fails)
    x = torch.randn(2, 3)
    sparsify_(model, gates="input", include=["b", "third"])
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha[:4] = -9.0
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model.eval()(x))
    assert small.second.out_features == small.third.in_features == 2
    assert small.a.out_features == 6
    reason = next(row["reason"] for row in small.report.sites if row["name"] == "b")
    assert reason.startswith(
        "gathers 2 of the 6 inputs that arrive from aten::tanh_ (test_liveness.py:"
    )
    assert reason.endswith("whose rule fails (IndexError: a form of the op)")


@pytest.mark.parametrize("region", [torch.no_grad, torch.enable_grad])
def test_a_region_under_another_mode_is_not_followed_but_right(region: Any) -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            with region():
                y = torch.relu(self.a(x))
            return self.b(y)

    model: Any = sparsify_(Frozen().double(), gates="input").eval()
    with torch.no_grad():
        model.b.log_alpha[:3] = -9.0
        model.a.log_alpha[0] = -9.0
    x = torch.randn(4, 3, dtype=torch.float64)
    small: Any = prune(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-10, atol=1e-10)
    assert "read outside" not in str(small.report)


LINEAR_NETS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "branches": lambda n, x: n.b(torch.relu(n.a(x))) + n.c(torch.sigmoid(n.a(x))),
    "sum inside": lambda n, x: n.b(n.a(x) + x.sum(-1, keepdim=True)),
    "two readers": lambda n, x: (lambda y: n.b(y) * n.c(y.abs()))(n.a(x).tanh()),
    "product": lambda n, x: n.b(n.a(x) * n.a(x).sigmoid()),
    "tokens": lambda n, x: n.b(n.a(x[:, None].expand(-1, 7, -1)).tanh()).mean(1),
    "split": lambda n, x: n.b(torch.cat(n.a(x).chunk(2, -1)[::-1], -1)),
    "stack": lambda n, x: n.b(torch.stack([n.a(x), n.a(-x)]).amax(0)),
    "writes in place": lambda n, x: n.b(n.a(x).clone().clamp_(0.1)),
    "sorted": lambda n, x: n.b(n.a(x).sort(-1).values),
    "normalised": lambda n, x: n.b(nn.functional.normalize(n.a(x), dim=-1)),
    "output too": lambda n, x: torch.cat([n.b(n.a(x).relu()), n.a(x)], -1),
    "rolled": lambda n, x: n.b(n.a(x).roll(2, -1)),
    "outer": lambda n, x: n.b((n.a(x)[:, None, :] * torch.ones(1, 4, 1).to(x)).flatten(0, 1)),
}


@pytest.mark.parametrize(("name", "gates"), thinned_product(2, LINEAR_NETS, ["input", "output"]))
def test_any_arrangement_stays_the_same_function(name: str, gates: str) -> None:
    model = sparsify_(Functional(LINEAR_NETS[name]).double(), gates=gates).eval()
    used = {"a", "b"} | ({"c"} if "branches" in name or "readers" in name else set())
    with torch.no_grad():
        for layer in (getattr(model, site) for site in used):
            layer.log_alpha.normal_(-1, 2)
            layer.log_alpha[:2] = torch.tensor([5.0, -5.0])
    x = torch.randn(5, 3, dtype=torch.float64)
    small: Any = prune(model, x)
    with torch.no_grad():
        got, expected = small(x), model(x)
    assert (got - expected).abs().max() <= 1e-10 * expected.abs().max()
    undone = [note for note in small.report.notes if not note.startswith("not run")]
    assert undone == []  # right at once
