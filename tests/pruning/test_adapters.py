"""Adapters that were put on before the gates: what is closed goes from both, and they merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from l0fast import DensityConstraint, load_pruned, param_groups, prune, save_pruned, sparsify_
from l0fast.layers.handle import gated_layers, own_gates
from tests.helpers.half_closed import assert_merged, assert_same, half_closed

peft = pytest.importorskip("peft")

X = torch.randn(2, 5, 6, dtype=torch.float64)


class Block(nn.Module):
    """Attention of four heads, and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 24), nn.Linear(8, 6)
        self.up, self.gate, self.down = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, 2)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return self.down(self.up(x) * torch.sigmoid(self.gate(x)))


def adapted() -> Any:
    """With low-rank adapters that are not zero, as after some training."""
    chosen = peft.LoraConfig(r=4, target_modules=["qkv", "out", "up", "down"])
    model: Any = peft.get_peft_model(Block(), chosen).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def test_heads_and_units_go_from_layers_and_adapters(tmp_path: Path) -> None:
    model = half_closed(adapted(), X, exclude="*lora_B*")
    owners = [name.removeprefix("base_model.model.") for name in own_gates(gated_layers(model))]
    assert owners == ["out.base_layer", "down.base_layer"]
    small: Any = prune(model, X)
    assert_merged(small)
    assert_same(small, model, X)
    assert isinstance(small, peft.PeftModel)
    inner = small.base_model.model
    for layer, (inputs, outputs) in {
        inner.qkv: (6, 12), inner.out: (4, 6), inner.up: (6, 6), inner.down: (6, 3)
    }.items():  # fmt: skip
        assert layer.base_layer.weight.shape == (outputs, inputs)
        assert layer.lora_A.default.weight.shape == (4, inputs)
        assert layer.lora_B.default.weight.shape == (outputs, 4)
        assert (layer.in_features, layer.out_features) == (inputs, outputs)
    trained = {name.split(".")[-3] for name, p in small.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    save_pruned(small, tmp_path / "small.safetensors")
    again = load_pruned(adapted, tmp_path / "small.safetensors").eval()
    torch.testing.assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(again(X), small(X))
    merged = copy.deepcopy(small).merge_and_unload()
    assert type(merged) is Block
    assert {type(layer) for layer in merged.children()} == {nn.Linear}
    torch.testing.assert_close(merged(X), small(X))


def test_ranks_can_go_and_what_reads_the_models_input_has_no_gather() -> None:
    model = half_closed(nn.Sequential(adapted()), X)
    reasons = sparsify_(adapted(), example_inputs=X, dry_run=True)
    (row,) = (row for row in reasons.layers if row.name.endswith("qkv.lora_A.default"))
    assert (row.gates, row.reason) == (
        "",
        "with a gather before it, an adapter could not be merged",
    )
    small: Any = prune(model, X)
    assert_same(small, model, X)
    assert small[0].base_model.model.up.lora_B.default.in_features == 2
    torch.testing.assert_close(copy.deepcopy(small[0]).merge_and_unload()(X), small(X))


def test_a_training_moves_adapters_and_gates_alone() -> None:
    model = sparsify_(adapted().float(), example_inputs=X.float())
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any("base_layer" in name for name in frozen)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, steps=8))
    constraint = DensityConstraint(model, 0.5, measure="params", example_inputs=X.float(), steps=8)
    for _ in range(8):
        (model(X.float()).square().mean() + constraint()).backward()
        optimizer.step()
        optimizer.zero_grad()
        constraint.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())
    small: Any = prune(model, X.float())
    after, before = small.report.params
    assert after <= 0.5 * before


def test_an_adapter_that_came_later_is_refused() -> None:
    model = sparsify_(adapted().float(), example_inputs=X.float())
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["down"]))
    with pytest.raises(ValueError, match=r"an adapter on the gated layer base_model\.model\.down"):
        prune(model, X.float())
