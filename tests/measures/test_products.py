"""Attention reckoned: products of matrices cost by their open heads, as the pruned model's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from l0fast import DensityConstraint, prune, sparsify_
from l0fast.graph.calls import Example
from l0fast.layers.handle import gated_layers
from l0fast.measures import products
from l0fast.measures.flops import count_ops
from l0fast.measures.measure import SIZES
from tests.helpers.thinned import telling
from tests.helpers.zoo import ZOO


class Attention(nn.Module):
    """Written by hand: [N, T, 8] with some query heads of 4, for each of `shared` key heads."""

    def __init__(self, heads: int = 6, shared: int = 1, fused: bool = False) -> None:
        super().__init__()
        self.q_heads, self.kv_heads, self.fused = heads, heads // shared, fused
        self.q = nn.Linear(8, 4 * self.q_heads, bias=False)
        self.k = nn.Linear(8, 4 * self.kv_heads, bias=False)
        self.v = nn.Linear(8, 4 * self.kv_heads, bias=False)
        self.o = nn.Linear(4 * self.q_heads, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (layer.out_features // 4, 4)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.q_heads != self.kv_heads)
        else:
            shared = self.q_heads // self.kv_heads
            k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
            y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.o(y.transpose(1, 2).flatten(2))


X = torch.randn(2, 5, 8, dtype=torch.float64)


def gated(**options: Any) -> Any:
    return sparsify_(Attention(**options).double(), include="o", example_inputs=X).eval()


def close_at_random(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in gated_layers(model).values():
            shut = torch.rand(layer.log_alpha.shape) < 0.5
            shut[torch.randint(len(shut), ())] = False
            layer.log_alpha.copy_(torch.where(shut, -torch.inf, torch.inf))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("measure", SIZES)
def test_the_expectation_written_out(measure: str, shared: int, fused: bool) -> None:
    model = gated(shared=shared, fused=fused)
    (layer,) = gated_layers(model).values()
    assert layer.num_gates == 6 // shared
    with torch.no_grad():
        layer.log_alpha.normal_()
    n, t, size = 2, 5, 4  # examples, tokens, of a head
    kv = layer.open_probability().sum()
    q = shared * kv
    parameters = 8 * size * (q + 2 * kv) + size * q * 8
    scores, result = n * q * t * t, n * q * t * size
    cost = {
        "params": parameters + 8,
        "macs": n * t * parameters + scores * size + result * t,
        "memory": 8 * (n * t * (size * (q + 2 * kv) + 8) + scores + result),
    }[measure]
    dense = {
        "params": 8 * size * (6 + 12 // shared) + size * 6 * 8 + 8,
        "macs": n * t * (8 * size * (6 + 12 // shared) + size * 48) + 2 * n * 6 * t * t * size,
        "memory": 8 * (n * t * (size * (6 + 12 // shared) + 8) + n * 6 * t * (t + size)),
    }[measure]
    constraint = DensityConstraint(model, 1.0, measure=measure, example_inputs=X)
    got = constraint.densities()
    torch.testing.assert_close(got, (cost / dense).reshape(1))
    wanted = torch.autograd.grad(cost / dense, layer.log_alpha, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, layer.log_alpha), wanted)


@pytest.mark.parametrize(
    "name",
    telling(
        ["vit", "gpt2", "gpt2 with attributes", "bert", "llama", "vgg", "mobilenet", "unet"],
        ["gpt2", "bert", "unet"],
    ),
)
def test_of_closed_and_open_gates_it_is_the_pruned_models_count(name: str) -> None:
    torch.manual_seed(0)
    build, example = ZOO[name]
    args = example() if isinstance(example(), tuple) else (example(),)
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    model = sparsify_(build().double().eval(), example_inputs=args, density_init=1.0)
    constraints = {
        measure: DensityConstraint(model, 1.0, measure=measure, example_inputs=args)
        for measure in SIZES
    }
    close_at_random(model)
    report: Any = prune(model, args).report
    for measure, constraint in constraints.items():
        kept, dense = getattr(report, measure)
        assert kept < dense
        assert float(constraint.densities().detach()) == pytest.approx(kept / dense, rel=1e-12)


@pytest.mark.parametrize("measure", ["macs", "memory"])
def test_prune_holds_them(measure: str) -> None:
    model = gated(heads=12)
    with torch.no_grad():
        model.o.log_alpha.copy_(torch.arange(1.0, 13.0))
    report: Any = prune(model, X, 0.5, measure=measure).report
    kept, dense = getattr(report, measure)
    assert 0.4 < kept / dense <= 0.5
    # Named layers alone: the products belong to none of them.
    alone: Any = prune(model, X, {"o": 1.0}, measure=measure).report
    full = 10 * 48 * 8 if measure == "macs" else 8 * 10 * 8
    assert alone.groups["o"]["total"] == full


def test_a_part_has_its_own_products() -> None:
    """A model whose second block is measured as a whole, beside one with a name like it."""
    model: Any = nn.ModuleDict({"a": gated(), "ab": gated()})
    both = nn.Sequential(model["a"], model["ab"])
    _held = DensityConstraint(both[1], 0.7, measure="macs", example_inputs=X)
    close_at_random(both)
    report: Any = prune(both, X).report
    (group,) = report.groups.values()
    alone = count_macs_of(gated())
    assert group["total"] == alone


def count_macs_of(model: Any) -> int:
    report: Any = prune(model, X).report
    return report.macs[1]


def test_what_is_not_reckoned_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "PRODUCTS", ("aten::bmm",))
    line = r"^measure: got 'macs'; expected another: .* aten::matmul is not reckoned\)$"
    with pytest.raises(ValueError, match=line):
        DensityConstraint(gated(), 0.9, measure="macs", example_inputs=X)
    DensityConstraint(gated(), 0.9, measure="params", example_inputs=X)


def test_activations_are_what_layers_and_products_give() -> None:
    first = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net = nn.Sequential(*first, nn.Flatten(), nn.Linear(36, 3))
    counts = count_ops(net, Example.of(torch.randn(2, 2, 5, 5))).elements
    assert counts == {"": 2 * (36 + 36 + 3), "0": 72, "1": 72, "2": 0, "3": 0, "4": 6}
    assert net.training
