"""bench.axes: its texts and the table."""

from __future__ import annotations

import pytest

import l0fast

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
    row = {"seed": 0, "method": axes.ALL, "steps": 4, "seconds": 2.0, "params": 1234, "loss": 0.0}
    row |= {"attentions": 3, "mlps": 2, "heads": 9, "ffn": 70, "hidden": 8, "ms": 2.0, "ratio": 0.5}
    text = axes.table([row], {"torch": "2"})
    line = (
        "| 0 | gates: depth, hidden, heads, FFN | 1,234 | 0.0000 | 3 | 2 | 9 | 70 | 8 | 2.0 | 0.50 "
    )
    assert f"{line}| 0.50 |" in text


def test_what_is_left_is_counted_along_each_axis() -> None:
    model = axes.decoder(32, 3)
    dense = {"attentions": 3, "mlps": 3, "heads": 12, "ffn": 3 * 80, "hidden": 32}
    assert axes.left(model) == dense
    l0fast.sparsify_(model, example_inputs=axes.EXAMPLE, depth=True, skip=False)
    for name, layer in l0fast.gates(model).layers.items():
        shut = "1.self_attn.o_proj.branch" in name
        layer.log_alpha.data.fill_(-5.0 if shut else 3.0)
        if name.endswith("2.mlp.down_proj"):
            layer.log_alpha.data[:7] = -5.0
    small = l0fast.prune(model, axes.EXAMPLE)
    assert axes.left(small) == dense | {"attentions": 2, "heads": 8, "ffn": 3 * 80 - 7}
