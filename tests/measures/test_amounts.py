"""Targets in words: what they mean, what is refused, and that every door takes them alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l0fast import Constraints, DensityConstraint, prune, sparsify_
from l0fast.layers.handle import gated_layers
from l0fast.measures.amounts import check, share, words

X = torch.randn(2, 6)
DENSE = {"gates": 6 * 12 + 12 * 9 + 9 * 3, "params": 7 * 12 + 13 * 9 + 10 * 3}
DENSE |= {"macs": 2 * DENSE["gates"], "memory": 4 * 2 * (12 + 9 + 3)}


def model(**options: Any) -> Any:
    """6-12-9-3, with gates that differ."""
    layers = [nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)]
    gated = sparsify_(nn.Sequential(*layers), example_inputs=X, **options)
    with torch.no_grad():
        for layer in gated_layers(gated).values():
            layer.log_alpha.copy_(torch.linspace(3.0, 1.0, layer.num_gates))
    return gated.eval()


@pytest.mark.parametrize(
    ("text", "measure", "value"),
    [
        ("100 params", "params", 100),
        ("1_000 params", "params", 1000),
        ("100k params", "params", 1e5),
        (" 1.5 M PARAMS ", "params", 1.5e6),
        ("5M MACs", "macs", 5e6),
        ("2e3 macs", "macs", 2e3),
        ("1 MB", "memory", 1e6),
        ("250kB", "memory", 2.5e5),
        ("2 ms", "latency", 2e-3),
        ("35us", "latency", 3.5e-5),
        ("0.5 s", "latency", 0.5),
        ("12 gates", "gates", 12),
        ("3.5 cost", "energy", 3.5),
    ],
)
def test_what_they_mean(text: str, measure: str, value: float) -> None:
    assert check("target", text, measure) == text
    assert share("target", text, measure, total=2 * value) == pytest.approx(0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "measure"),
    [
        ("", "params"),
        ("100000", "params"),
        ("5M macs", "params"),
        ("0 params", "params"),
        ("-5 params", "params"),
        ("5m params", "params"),
        ("5 mmacs", "macs"),
        ("2 ms", "gates"),
        ("2 Ms", "latency"),
        ("1 Mb", "memory"),
        ("nan params", "params"),
        ("1 2 params", "params"),
        ("1e400 params", "params"),
    ],
)
def test_what_is_no_amount_of_that_measure(text: str, measure: str) -> None:
    line = r"^fc1: got .*; expected a density in \(0, 1\], or an amount such as '"
    with pytest.raises(ValueError, match=line):
        check("fc1", text, measure)


def test_what_cannot_be_met_is_refused_with_the_range_in_the_same_unit() -> None:
    least = (1 + 1) * 1 + (1 + 1) * 1 + (1 + 1) * 3
    for text in (f"{least - 1} params", f"{DENSE['params'] + 1} params"):
        line = f"^target: got '{text}'; expected an amount from {least} params to 231 params$"
        with pytest.raises(ValueError, match=line):
            DensityConstraint(model(), text, measure="params", example_inputs=X)
    DensityConstraint(model(), f"{least} params", measure="params", example_inputs=X)
    with pytest.raises(ValueError, match=r"^target\['2'\]: got '1 gates'; expected an amount from"):
        DensityConstraint(model(), {"2": "1 gates"})
    with pytest.raises(ValueError, match=r"^target: got '9 params'; expected a density of at lea"):
        prune(model(), X, "9 params", measure="params")


@pytest.mark.parametrize("measure", DENSE)
def test_every_door_takes_them_alike(measure: str) -> None:
    unit = words(0, measure).removeprefix("0 ")
    half = DENSE[measure] // 2
    text = f"{half} {unit}"
    gated = model()
    constraint = DensityConstraint(gated, text, measure=measure, example_inputs=X)
    assert constraint.targets == {"model": half / DENSE[measure]}
    left: Any = prune(gated, X).report
    named: Any = prune(model(), X, text, measure=measure).report
    ratio: Any = prune(model(), X, half / DENSE[measure], measure=measure).report
    assert left["layers"] == named["layers"] == ratio["layers"] != []
    for report in (left, named, ratio):
        (group,) = report.groups.values()
        assert group["total"] == DENSE[measure]
        assert group["kept"] <= half
        if measure in report:
            assert getattr(report, measure) == [group["kept"], group["total"]]
    again = DensityConstraint(model(), 1.0, measure=measure, example_inputs=X)
    again.load_state_dict(constraint.state_dict())
    assert again.targets == constraint.targets


def test_an_amount_is_met_to_the_unit() -> None:
    """Rounding must not take away what is just allowed."""
    for amount in (150, 187, 201):
        small: Any = prune(model(), X, f"{amount} params", measure="params").report
        fits = small["params"][0]
        assert fits <= amount
        exact: Any = prune(model(), X, f"{fits} params", measure="params").report
        assert exact.params[0] == fits


def test_mixed_with_densities_in_one_dict_and_with_other_measures() -> None:
    gated = model()
    both = Constraints(
        [
            DensityConstraint(gated, {"0": "30 gates", "[24]": 0.5}),
            DensityConstraint(gated, "100 B", measure="memory", example_inputs=X),
        ]
    )
    targets = [list(term.targets.values()) for term in both.constraints]  # type: ignore[union-attr]
    assert targets == [[30 / 72, 0.5], [100 / DENSE["memory"]]]
    report: Any = prune(gated, X).report
    assert report.memory[0] <= 100
    assert all(group["density"] <= group["target"] for group in report.groups.values())


def test_a_cost_of_ones_own_may_have_one() -> None:
    def energy(opened: Any) -> Any:
        return sum(p.sum() for p in opened.values())

    constraint = DensityConstraint(model(), "13.5 cost", measure=energy)
    assert constraint.targets == {"model": 13.5 / 27}


def test_words() -> None:
    assert words(266610, "params") == "266,610 params"
    assert words(0.00125, "latency") == "1.25 ms"
    assert words(3.5e-5, "latency") == "35 us"
    assert words(4000, "memory") == "4,000 B"
    assert words(3.5, "energy") == "3.5 cost"
