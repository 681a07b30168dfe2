"""Which gates a layer has of those that several share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from l0fast import L0Conv2d, L0Linear
from l0fast.layers.serving import Share, alike, likeliest

FIRST, SECOND = Share((0, 1, 2), 5), Share((4, 3, 1), 5)


def readers() -> tuple[Any, Any]:
    """A convolution, and a Linear that reads each of its units at two places."""
    first = L0Conv2d.from_dense(nn.Conv2d(3, 4, 1), gates="input", share=FIRST)
    second = L0Linear.from_dense(nn.Linear(6, 2), units=2, shared=first, share=SECOND)
    return first, second


def test_each_layer_has_its_own_gates() -> None:
    first, second = readers()
    assert first.log_alpha is second.log_alpha
    assert (len(first.log_alpha), first.num_gates, second.num_gates) == (5, 3, 3)
    assert (first.group_size, second.group_size) == (4, 4)
    values = torch.arange(5)
    assert first.own(values).tolist() == [0, 1, 2]
    assert second.own(values[None]).tolist() == [[4, 3, 1]]
    assert second.spread(values).tolist() == [4, 4, 3, 3, 1, 1]
    assert second.places().tolist() == [4, 3, 1]


def test_outputs_are_those_of_the_gated_inputs() -> None:
    first, second = readers()
    with torch.no_grad():
        first.log_alpha.copy_(torch.tensor([-1.0, 0.0, 1.0, -9.0, 0.5]))
    z = first.evaluation_gates()
    for layer, x, gates in (
        (first.eval(), torch.randn(2, 3, 4, 4), z[:3].view(1, 3, 1, 1)),
        (second.eval(), torch.randn(2, 6), z[[4, 4, 3, 3, 1, 1]]),
    ):
        dense = layer.dense()
        assert not dict(dense.named_buffers())
        torch.testing.assert_close(layer(x), dense(x * gates))
        torch.testing.assert_close(layer.folded(z)(x), layer(x))


def test_the_index_goes_where_the_layer_goes_but_into_no_state() -> None:
    first, _ = readers()
    assert list(first.state_dict()) == ["weight", "bias", "log_alpha", "_extra_state"]
    assert first.to("meta").gate_index.is_meta
    assert first.bfloat16().gate_index.dtype == torch.int64


def test_parts_that_the_same_layers_have() -> None:
    parts = {tuple(part.tolist()) for part in alike(readers())}
    assert parts == {(0, 2), (1,), (3, 4)}
    assert [part.tolist() for part in alike([L0Linear(3, 2)])] == [[0, 1, 2]]


def test_the_likeliest_gate_of_each_part() -> None:
    scores = torch.tensor([1.0, 0.0, 1.0, 5.0, 2.0])
    assert likeliest(readers(), scores).tolist() == [True, True, False, True, False]
    assert likeliest([L0Linear(3, 2)], torch.zeros(3)).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": Share((0, 1), 5)}, "share: got '2 gates on inputs'; expected 3 gates"),
        ({"share": Share((0, 1, 5), 5)}, r"share: got \(0, 5\)"),
        ({"share": FIRST, "gates": "output"}, "share: got '3 gates on outputs'"),
        ({"share": Share((0, 1, 2), 4), "shared": True}, "shared: got '5 gates on its inputs'"),
    ],
)
def test_what_is_no_part_is_refused(options: dict[str, Any], message: str) -> None:
    if "shared" in options:
        options = options | {"shared": readers()[0]}
    with pytest.raises(ValueError, match=message):
        L0Linear.from_dense(nn.Linear(3, 2), **options)
