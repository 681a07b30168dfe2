"""Stalls: when there is one, since when, and what it says to change."""

from __future__ import annotations

from typing import Any

import pytest

from l0fast.constraints.stall import LEAST_WINDOW, find_stalls, last_messages

Rows = list[dict[str, Any]]


def rows(densities: list[float], multipliers: list[float], aim: float = 0.1) -> Rows:
    """A history of one constraint."""
    return [
        {"epoch": epoch, "density": {"m": d}, "aim": {"m": aim}, "lambda": {"m": m}}
        for epoch, (d, m) in enumerate(zip(densities, multipliers, strict=True), 1)
    ]


GROWING = [float(epoch) for epoch in range(1, 9)]
FLAT = [0.9, 0.8, *[0.5] * 6]


def stalls(history: Rows, epochs: int = 10) -> Any:
    return find_stalls(history, {"m": 0.1}, epochs)


def test_a_stall() -> None:
    found = stalls(rows(FLAT, GROWING))["m"]
    assert (found.name, found.target, found.since) == ("m", 0.1, 3)
    assert found.densities == (0.5, 0.5)
    assert found.multipliers == (3.0, 8.0)


@pytest.mark.parametrize(
    ("densities", "multipliers", "aim"),
    [
        (FLAT[:6], GROWING[:6], 0.1),  # of six epochs, one is before the density lay still
        ([0.5] * LEAST_WINDOW, GROWING[:LEAST_WINDOW], 0.1),  # too short to tell
        ([0.9 - 0.05 * e for e in range(8)], GROWING, 0.1),  # it falls
        (FLAT, [5.0] * 8, 0.1),  # the multiplier lies still, too
        (FLAT, GROWING[::-1], 0.1),
        ([0.1005] * 8, GROWING, 0.1),  # where it should be
        (FLAT, GROWING, 0.5),  # where the schedule wants it for now
        ([0.9, 0.8, 0.5, 0.5, 0.09, 0.5, 0.5, 0.5], GROWING, 0.1),  # it has been met meanwhile
    ],
)
def test_no_stall(densities: list[float], multipliers: list[float], aim: float) -> None:
    assert stalls(rows(densities, multipliers, aim)) == {}


def test_the_window_grows_with_the_training() -> None:
    history = rows([0.5] * 8, GROWING)
    assert stalls(history, epochs=25)
    assert not stalls(history, epochs=50)


def test_a_slow_fall_is_none() -> None:
    """5 % of the way to the target within the window is enough."""
    for fall, stalled in ((0.019, True), (0.021, False)):
        densities = [0.5 - fall * epoch / LEAST_WINDOW for epoch in range(LEAST_WINDOW + 1)]
        assert bool(stalls(rows(densities, GROWING[: LEAST_WINDOW + 1]))) == stalled


def test_the_message() -> None:
    strong = stalls(rows([0.9, 0.8, 0.45, *[0.5] * 5], GROWING))["m"]
    assert strong.message(0.1, 0.03) == (
        "stalled: the density of m is 0.5000; it was 0.4500 in epoch 3 and has come no nearer to "
        "its target 0.1 since. Its multiplier went from 3 to 8: the gates do not follow the "
        "multiplier; try a larger gate learning rate (it is 0.03), more epochs or a higher target"
    )
    weak = stalls(rows(FLAT, [m / 10 for m in GROWING]))["m"].message(1e-4, 0.03)
    assert "the multiplier is still too small to close gates" in weak
    assert "try a larger dual learning rate (it is 0.0001), more epochs" in weak


def test_the_last_message_of_each_is_kept() -> None:
    history: Rows = [{}, {"stalls": {"a": "1", "b": "1"}}, {"stalls": {"a": "2"}}, {"stalls": {}}]
    assert last_messages(history) == {"a": "2", "b": "1"}
