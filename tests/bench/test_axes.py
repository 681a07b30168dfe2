"""bench.axes: its texts and the table."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from bench import axes


def test_a_text_is_trained_on_or_held_out() -> None:
    train, test = axes.docstrings(["l0fast"])
    both = bytes(train.tolist()).decode(), bytes(test.tolist()).decode()
    assert len(both[0]) > len(both[1]) > 0
    parts = [set(one.split("\n\n")) for one in both]
    longest = max(parts[1], key=len)
    assert longest not in parts[0]


def test_the_table_says_what_each_method_left() -> None:
    row = {"seed": 0, "method": axes.ALL, "params": 1234, "loss": 0.0, "layers": 3, "hidden": 8}
    text = axes.table([{**row, "ms": 2.0, "ratio": 0.5}], {"torch": "2"})
    assert "| 0 | gates: depth, hidden, heads, FFN | 1,234 | 0.0000 | 1.000 | 3 | 8 |" in text
