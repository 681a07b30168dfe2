"""The handle: what l0fast keeps with a model, and with whose lifetime."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import l0fast
from l0fast import DensityConstraint, L0Linear, L0Penalty, prune, sparsify_
from l0fast.layers.handle import ATTRIBUTE, gated_layers, gates


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def gated(**options: Any) -> Any:
    model = sparsify_(net(), example_inputs=X, **options)
    with torch.no_grad():
        for layer in gated_layers(model).values():
            layer.log_alpha.fill_(9.0)
    return model


def report_of(*args: Any, **options: Any) -> Any:
    """What `prune` reports."""
    return prune(*args, **options).report


def ours(model: nn.Module) -> dict[str, set[str]]:
    """Name of each module of the user's -> attributes that plain PyTorch does not have."""
    plain = {type(m): set(vars(m)) for m in (*net().modules(), nn.BatchNorm1d(2))}
    return {
        name: found
        for name, module in model.named_modules()
        if type(module) in plain and (found := set(vars(module)) - plain[type(module)])
    }


def test_one_attribute_on_the_model_and_none_on_its_parts() -> None:
    model = gated(skip=True)
    constraint = DensityConstraint(model, 0.5, measure="params", example_inputs=X)
    (model(X).square().mean() + constraint()).backward()
    constraint.step()
    prune(model, X)
    assert ours(model) == {"": {ATTRIBUTE}}


def test_layers_hold_no_state_of_a_step() -> None:
    model = gated(skip=True)
    before = {name: dict(vars(layer)) for name, layer in gated_layers(model).items()}
    model(X).sum().backward()
    for name, layer in gated_layers(model).items():
        assert vars(layer).keys() == before[name].keys()
        assert all(vars(layer)[key] is value for key, value in before[name].items())


def test_it_is_the_same_each_time_and_prints_a_row_for_each_layer() -> None:
    model = gated()
    constraint = DensityConstraint(model, {"0": 0.25})
    handle = l0fast.gates(model)
    assert l0fast.gates(model) is handle
    lines = str(handle).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == list(handle.layers) == ["0", "2", "4"]
    assert "6" in lines[1].split()
    assert repr(constraint) in lines
    with pytest.raises(ValueError, match=r"model: got 'Sequential'; expected a model with gates"):
        gates(net())
    assert ATTRIBUTE not in vars(net())


def test_it_follows_the_layers_that_the_model_has() -> None:
    model: Any = gated()
    gates(model)
    model[2] = L0Linear(12, 8)
    assert gates(model).layers["2"] is model[2]
    model[2] = nn.Linear(12, 8)
    assert list(gates(model).layers) == ["0", "4"]
    model(X)  # the layers that are left are drawn for


def test_a_constraint_that_is_deleted_is_gone() -> None:
    model = gated()
    first = DensityConstraint(model, 0.3)
    assert gates(model).constraints == (first,)
    assert report_of(model, X).density <= 0.3
    seen = weakref.ref(first)
    del first
    gc.collect()
    assert seen() is None
    assert gates(model).constraints == ()
    assert report_of(model, X).density == 1.0
    second = DensityConstraint(model, {"0": 0.5})
    with pytest.warns(UserWarning, match="^settle: "):
        second.settle()  # there is no other target any more
    assert second.settled


def test_a_constraint_that_lives_keeps_another_from_settling() -> None:
    model = gated()
    first = DensityConstraint(model, 0.3)
    second = DensityConstraint(model, {"0": 0.5})
    with pytest.raises(ValueError, match=r"^settle: got '0 2 4 by gates'; expected no other"):
        second.settle()
    with pytest.raises(ValueError, match=r"^settle: got '0 by gates'; expected no other"):
        first.settle()


def test_prune_holds_the_constraint_that_is_named() -> None:
    model = gated()
    loose, tight = DensityConstraint(model, 0.8), DensityConstraint(model, {"2": 0.25})
    kept = {site["name"]: site["gates_open"] for site in report_of(model, X, loose).sites}
    assert kept["2"] > 3
    both = report_of(model, X)
    assert both.density <= 0.8
    assert {site["name"]: site["gates_open"] for site in both.sites}["2"] == 3
    named = report_of(model, X, target=tight)
    assert list(named.groups) == ["2"]
    with pytest.raises(
        ValueError, match=r"^target: got 'DensityConstraint'; expected a constraint"
    ):
        prune(gated(include="0"), X, target=loose)
    with pytest.raises(ValueError, match=r"^measure: got 'macs'; expected a target beside it"):
        prune(model, X, target=tight, measure="macs")
    assert report_of(model, X, L0Penalty(model, 0.1)).groups == {}


def test_copies_have_handles_of_their_own() -> None:
    model = gated(skip=True)
    constraint = DensityConstraint(model, 0.4)
    twin = copy.deepcopy(model)
    assert gates(twin) is not gates(model)
    assert gates(twin).structure is gates(model).structure
    assert all(layer is twin.get_submodule(n) for n, layer in gates(twin).layers.items())
    assert report_of(twin, X).density <= 0.4  # as long as the constraint lives
    again: Any = pickle.loads(pickle.dumps(model))
    assert gates(again).constraints == ()
    assert len(gates(again).skipping.links) == len(gates(model).skipping.links)
    torch.manual_seed(3)
    expected = model(X)
    torch.manual_seed(3)
    torch.testing.assert_close(again(X), expected, rtol=0.0, atol=0.0)
    del constraint
    both: Any = copy.deepcopy((model, DensityConstraint(model, 0.2)))
    assert gates(both[0]).constraints[-1] is both[1]
    assert report_of(both[0], X).density <= 0.2


def test_a_model_is_freed_without_the_collector() -> None:
    model = gated(skip=True)
    gc.collect()  # what torch.export leaves
    gc.disable()
    try:
        constraint = DensityConstraint(model, 0.5)
        (model(X).sum() + constraint()).backward()
        layer = weakref.ref(model.get_submodule("0"))
        del model, constraint
        assert layer() is None
    finally:
        gc.enable()


def test_a_gated_layer_alone_is_copied_alone() -> None:
    model = gated()
    alone = copy.deepcopy(model.get_submodule("2"))
    assert alone._places == ()
    z: Tensor = alone(torch.randn(2, 12))
    assert z.shape == (2, 8)


def test_a_constraint_on_a_part_is_held_on_that_part() -> None:
    inner = sparsify_(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), example_inputs=X)
    outer = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), inner)
    constraint = DensityConstraint(inner, 0.3)
    sparsify_(outer, example_inputs=X)
    for target in (None, constraint):
        (group,) = report_of(outer, X, target).groups.values()
        assert group["layers"] == ["3.0", "3.2"]


def test_a_constraint_that_a_list_holds_stays_out_of_the_pruned_model() -> None:
    model = gated()
    model.terms = [DensityConstraint(model, 0.5)]
    assert prune(model, X).terms == [None]
    assert gates(model).constraints == (model.terms[0],)
